"""Texts with labels: one for each text, or one for each word."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from preparing import contents

from transformer.checkpointing.run import resolve
from transformer.config import Config, ConfigError, replace
from transformer.data import prepare as preparing
from transformer.data import writing
from transformer.data.batches import train_batch, validation_batches
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared
from transformer.data.rows import RowSplit
from transformer.data.tokenizers import BOS, EOS
from transformer.objectives import objective_of, with_examples

MakeConfig = Callable[..., Config]
Record = dict[str, Any]


class TinyReviews(tfds.core.GeneratorBasedBuilder):
    """Texts with a class, and the same texts as words with a class each."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        words = tfds.features.Sequence(tfds.features.Text())
        tags = tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3))
        kinds = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["bad", "good"])}
        features = tfds.features.FeaturesDict(kinds | {"words": words, "tags": tags})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield from enumerate(reviews())


def reviews(count: int = 40) -> list[Record]:
    texts = [f"été {number}" if number % 3 else f"a {number} b" for number in range(count)]
    return [
        {"text": text, "label": number % 2, "words": text.split(), "tags": [number % 3, 1, 2][: len(text.split())]}
        for number, text in enumerate(texts)
    ]


@pytest.fixture
def labelled_config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from records, an objective and keys of `data` to a configuration."""

    def make(
        records: Sequence[Record] = (), objective: str = "sequence_classification", encoder: bool = True, **data: Any
    ) -> Config:
        if records:
            path = tmp_path / "records.jsonl"
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            data = {"path": (str(path),)} | data
        if objective == "token_classification":
            data = {"text_field": "words", "label_field": "tags"} | data
        config = make_config(**({"validation_documents": 0.3, "sequence_length": 32} | data))
        model = {"architecture": "encoder" if encoder else "decoder"}
        return replace(config, objective={"name": objective}, model=model)

    return make


def ready(config: Config) -> Prepared:
    return with_examples(prepare(config, False), objective_of(config), config)


def splits_of(prepared: Prepared) -> list[RowSplit]:
    train, validation = prepared.sources[0].train, prepared.sources[0].validation
    assert isinstance(train, RowSplit) and isinstance(validation, RowSplit)
    return [train, validation]


def rows_of(prepared: Prepared) -> list[dict[str, np.ndarray]]:
    return [split.window(number) for split in splits_of(prepared) for number in range(split.num_windows)]


def texts_of(prepared: Prepared, row: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Text, ids and labels of each example in a row, after a look at what surrounds them."""
    found = []
    for number in range(1, int(row["segment_ids"].max()) + 1):
        here = row["segment_ids"] == number
        ids = row["inputs"][here]
        assert ids[0] == BOS and ids[-1] == EOS
        assert row["positions"][here].tolist() == list(range(len(ids)))
        found.append((prepared.tokenizer.decode(ids), ids, row["labels"][here]))
    return found


@pytest.mark.parametrize("shard_bytes", [100, 2**20])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tfds"])
@pytest.mark.parametrize("objective", ["sequence_classification", "token_classification"])
def test_rows_hold_every_text_once_with_its_labels(
    labelled_config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    objective: str,
    shard_bytes: int,
) -> None:
    monkeypatch.setattr(preparing, "SHARD_BYTES", shard_bytes)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    records, data = reviews(), {"source": ("tfds:tiny_reviews",)}
    if kind == "parquet":
        path = tmp_path / "records.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        data = {"path": (str(path),)}
    prepared = ready(labelled_config(records if kind == "jsonl" else (), objective, **data))
    found = [example for row in rows_of(prepared) for example in texts_of(prepared, row)]
    expected = {record["text"]: record for record in records}
    assert sorted(text for text, _, _ in found) == sorted(expected)
    for text, ids, labels in found:
        if objective == "sequence_classification":
            assert labels.tolist() == [expected[text]["label"]] * len(ids)
            continue
        assert labels[labels >= 0].tolist() == expected[text]["tags"]
        # The tokens are bytes: a word after the first begins with its space.
        ends = np.append(np.flatnonzero(labels >= 0)[1:], len(ids) - 1)
        pieces = [prepared.tokenizer.decode(ids[a:b]) for a, b in zip(np.flatnonzero(labels >= 0), ends, strict=True)]
        words = expected[text]["words"]
        assert pieces == [words[0], *(f" {word}" for word in words[1:])]
    for split in splits_of(prepared):
        texts = [t for n in range(split.num_windows) for t in texts_of(prepared, split.window(n))]
        counts = [1 if objective == "sequence_classification" else len(text.split()) for text, _, _ in texts]
        assert split.num_tokens == sum(counts)
        assert split.num_bytes == sum(len(text.encode()) for text, _, _ in texts)
    assert prepared.num_labels == (2 if objective == "sequence_classification" else 3)


def test_every_label_is_a_target_once_an_epoch(labelled_config: Callable[..., Config]) -> None:
    config = replace(labelled_config(reviews()), train={"batch_size": 1})
    prepared = ready(config)
    size = splits_of(prepared)[0].num_windows
    batches = [train_batch(config, prepared, step) for step in range(size)] + list(
        validation_batches(config, prepared, [0])
    )
    found = [target for batch in batches for target in batch["targets"][batch["weights"] > 0].tolist()]
    assert sorted(found) == sorted(record["label"] for record in reviews())


def test_named_labels_are_numbered_in_sorted_order(labelled_config: Callable[..., Config]) -> None:
    names = ["zeta", "alpha", "mu"]
    records = [{"text": f"text {number}", "label": names[number % 3]} for number in range(60)]
    prepared = ready(labelled_config(records))
    assert (prepared.num_labels, prepared.sources[0].labels) == (3, ("alpha", "mu", "zeta"))
    expected = {record["text"]: sorted(names).index(record["label"]) for record in records}
    found = [(text, labels[0]) for row in rows_of(prepared) for text, _, labels in texts_of(prepared, row)]
    assert dict(found) == expected and len(found) == 60


def test_sources_number_their_labels_together(labelled_config: Callable[..., Config], tmp_path: Path) -> None:
    for name, labels in (("one", "ac"), ("two", "bc")):
        records = [{"text": f"{name} {number}", "label": labels[number % 2]} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sources = tuple(f"local_text:{tmp_path}/{name}.jsonl" for name in ("one", "two"))
    prepared = ready(labelled_config(source=sources))
    assert [source.labels for source in prepared.sources] == [("a", "b", "c")] * 2
    alone = ready(labelled_config(source=sources[1:]))
    assert (
        alone.sources[0].labels == ("b", "c")
        and alone.sources[0].train.directory != prepared.sources[1].train.directory
    )


def test_resolve_takes_the_number_of_labels_from_the_data(labelled_config: Callable[..., Config]) -> None:
    config = labelled_config(reviews())
    prepared = ready(config)
    assert resolve(config, 260, prepared.num_labels).model.num_labels == 2
    assert resolve(replace(config, model={"num_labels": 5}), 260, prepared.num_labels).model.num_labels == 5
    with pytest.raises(ConfigError, match=r"model\.num_labels = 1 is smaller than the 2 labels of the data"):
        resolve(replace(config, model={"num_labels": 1}), 260, prepared.num_labels)


@pytest.mark.parametrize(
    ("objective", "record", "message"),
    [
        ("sequence_classification", {"text": "a"}, r"data\.label_field = 'label': .*line 3, has the fields text"),
        ("sequence_classification", {"text": "a", "label": -1}, r"line 3, has -1 there: a label is text or a whole"),
        ("sequence_classification", {"text": "a", "label": 0.5}, r"line 3, has 0\.5 there: a label is text or a whole"),
        ("sequence_classification", {"text": "a", "label": "x"}, r"all names or all numbers, and there are 'x' and 0"),
        (
            "sequence_classification",
            {"text": ["a"], "label": 1},
            r"data\.text_field = 'text': .*has list there, not text",
        ),
        (
            "token_classification",
            {"words": "a b", "tags": [0, 1]},
            r"data\.text_field = 'words': .*has str there, not a",
        ),
        (
            "token_classification",
            {"words": ["a", "b"], "tags": 1},
            r"data\.label_field = 'tags': .*has int there, not a",
        ),
        ("token_classification", {"words": ["a", "b"], "tags": [1]}, r"line 3, has 1 labels for 2 words"),
        ("token_classification", {"words": ["a", ""], "tags": [1, 1]}, r"line 3, has an empty word"),
    ],
)
def test_mistakes_in_labels(
    labelled_config: Callable[..., Config], objective: str, record: Record, message: str
) -> None:
    both = {"text": "a b", "label": 0, "words": ["a", "b"], "tags": [0, 0]}
    with pytest.raises(ConfigError, match=message):
        prepare(labelled_config([both, both | {"text": "b", "words": ["b", "b"]}, record], objective), False)


def test_a_label_that_is_only_validated_is_named(labelled_config: Callable[..., Config]) -> None:
    records = [{"text": f"text {number}", "label": "a"} for number in range(40)]
    config = labelled_config(records)
    held_out = splits_of(ready(config))[1].window(0)
    text = ready(config).tokenizer.decode(held_out["inputs"][held_out["segment_ids"] == 1])
    records[int(text.split()[1])]["label"] = "b"
    # The label is part of the document, whose hash decides its side: look for one that stays.
    for number in range(200):
        changed = [*records, {"text": f"other {number}", "label": "c"}]
        try:
            ready(labelled_config(changed))
        except ConfigError as error:
            assert "occurs in the validation split alone" in str(error)
            break
    else:
        raise AssertionError("no label fell into the validation split alone")


def test_texts_that_are_too_long_or_empty_are_told(
    labelled_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    records = [{"text": "x" * length, "label": 0} for length in (0, 30, 31, 40, 0, 5, 6, 7, 8)]
    config = labelled_config(records, validation_documents=0.4)
    prepared = with_examples(prepare(config), objective_of(config), config)
    found = sorted(len(text) for row in rows_of(prepared) for text, _, _ in texts_of(prepared, row))
    assert found == [5, 6, 7, 8, 30]
    error = capfd.readouterr().err
    assert "2 examples of local_text have an empty text" in error
    counts = [int(line.split()[0]) for line in error.splitlines() if "longer than data.sequence_length = 32" in line]
    assert sum(counts) == 2


def test_an_interrupted_preparation_goes_on_to_the_same_bytes(
    labelled_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "SHARD_BYTES", 100)
    config = labelled_config([{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(60)])
    prepare(config, False)
    whole = contents(tmp_path / "cache")
    other = replace(config, data={"cache_dir": str(tmp_path / "other")})
    write, left = writing.write_records, [7]

    def write_some(*arguments: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(writing, "write_records", write_some)
    with pytest.raises(KeyboardInterrupt):
        prepare(other, False)
    monkeypatch.setattr(writing, "write_records", write)
    prepare(other, False)
    assert contents(tmp_path / "other") == whole
    assert sum(name.endswith("array_record") for name in whole) > 8

"""Pairs of texts: where they come from, what lies in the rows, and that each occurs once an epoch."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
from preparing import contents, finish, kill_twice, start

from transformer.config import Config, ConfigError, replace
from transformer.data import prepare as preparing
from transformer.data.batches import Batch, num_validation_batches, train_batch, train_batches, validation_batches
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared, prepare_apart
from transformer.data.rows import RowSplit
from transformer.data.tokenizers import BOS, EOS, NUM_SPECIAL
from transformer.objectives import objective_of, with_examples

MakeConfig = Callable[..., Config]
Pairs = Sequence[tuple[str, str]]


class TinyTranslate(tfds.core.GeneratorBasedBuilder):
    """A dataset of translations as TFDS has them: a field for each language."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.Translation(languages=("de", "en"))
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for number in range(40):
            yield number, {"de": f"große {number}", "en": f"big {number}"}


@pytest.fixture
def pairs_config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from pairs, held-out pairs and keys of `data` to a configuration that reads them from files."""

    def make(pairs: Pairs | None = None, held_out: Pairs = (), **data: Any) -> Config:
        for prefix, part in (("", pairs or ()), ("validation_", held_out)):
            for side, texts in zip(("source", "target"), zip(*part, strict=True), strict=False):
                path = tmp_path / f"{prefix}{side}.txt"
                path.write_text("".join(text + "\n" for text in texts), newline="")
                data.setdefault(f"{prefix}{side}_path", (str(path),))
        config = replace(make_config(**data), objective={"name": "seq2seq"}, model={"architecture": "encoder_decoder"})
        return config

    return make


def ready(config: Config) -> Prepared:
    return with_examples(prepare(config, False), objective_of(config), config)


def split_of(prepared: Prepared, name: str = "train") -> RowSplit:
    split = getattr(prepared.sources[0], name)
    assert isinstance(split, RowSplit)
    return split


def decoded(prepared: Prepared, row: dict[str, np.ndarray]) -> list[tuple[str, str]]:
    """The pairs in a row, after a look at all that surrounds their texts."""
    found = []
    for number in range(1, int(max(row["encoder_segment_ids"].max(), row["segment_ids"].max())) + 1):
        reads, writes = row["encoder_segment_ids"] == number, row["segment_ids"] == number
        source, inputs, targets = row["encoder_inputs"][reads], row["inputs"][writes], row["targets"][writes]
        assert inputs[0] == BOS and targets[-1] == EOS and source[-1] == EOS
        assert inputs[1:].tolist() == targets[:-1].tolist()
        assert row["encoder_positions"][reads].tolist() == list(range(len(source)))
        assert row["positions"][writes].tolist() == list(range(len(inputs)))
        assert (row["weights"][writes] == 1).all()
        assert EOS not in source[:-1] and EOS not in targets[:-1]
        found.append((prepared.tokenizer.decode(source), prepared.tokenizer.decode(targets)))
    return found


@pytest.fixture(scope="module")
def some_pairs(random_text: Callable[[int, int], str]) -> list[tuple[str, str]]:
    def line(seed: int) -> str:
        return " ".join(random_text(seed, 1 + seed % 5).split())

    return [(f"{number} {line(number)}", f"{line(number + 1)} {number}") for number in range(150)]


@pytest.mark.parametrize("shard_bytes", [300, 2**20])
@pytest.mark.parametrize(("length", "source_length"), [(100, None), (120, 90)])
def test_rows_decode_to_every_pair_once(
    pairs_config: Callable[..., Config],
    some_pairs: Pairs,
    monkeypatch: pytest.MonkeyPatch,
    shard_bytes: int,
    length: int,
    source_length: int | None,
) -> None:
    monkeypatch.setattr(preparing, "SHARD_BYTES", shard_bytes)
    prepared = ready(pairs_config(some_pairs, sequence_length=length, source_length=source_length))
    found = []
    for name in ("train", "validation"):
        split = split_of(prepared, name)
        assert (len(split.shards) > 2) == (shard_bytes == 300)
        rows = [split.window(number) for number in range(split.num_windows)]
        assert all(len(row["inputs"]) <= length for row in rows)
        assert all(len(row["encoder_inputs"]) <= (source_length or length) for row in rows)
        texts = [pair for row in rows for pair in decoded(prepared, row)]
        assert sum(shard.num_documents for shard in split.shards) == len(texts)
        assert split.num_tokens == sum(len(row["inputs"]) for row in rows)
        assert sum(shard.num_inputs for shard in split.shards) == sum(
            len(row["inputs"]) + len(row["encoder_inputs"]) for row in rows
        )
        assert split.num_bytes == sum(len(text.encode()) for pair in texts for text in pair)
        found += texts
    assert sorted(found) == sorted(some_pairs)


def test_a_row_as_it_is_written(pairs_config: Callable[..., Config]) -> None:
    config = pairs_config([("ab", "xyz"), ("c", "d")], [("q", "r")], sequence_length=8, source_length=6)
    prepared = ready(config)
    (row,) = (split_of(prepared).window(n) for n in range(split_of(prepared).num_windows))
    a, b, c, d, x, y, z = (ord(letter) + NUM_SPECIAL for letter in "abcdxyz")
    first = {"encoder_inputs": [a, b, EOS], "inputs": [BOS, x, y, z], "targets": [x, y, z, EOS]}
    second = {"encoder_inputs": [c, EOS], "inputs": [BOS, d], "targets": [d, EOS]}
    order = [first, second] if row["encoder_inputs"][0] == a else [second, first]
    for name in first:
        assert row[name].tolist() == order[0][name] + order[1][name]
    for side, name in (("encoder_", "encoder_inputs"), ("", "inputs")):
        sizes = [len(pair[name]) for pair in order]
        assert row[f"{side}segment_ids"].tolist() == [1] * sizes[0] + [2] * sizes[1]
        assert row[f"{side}positions"].tolist() == [*range(sizes[0]), *range(sizes[1])]
    batch = train_batch(replace(config, train={"batch_size": 2}), prepared, 0)
    kinds = {name: (values.dtype.name, values.shape) for name, values in batch.items()}
    names = ("inputs", "targets", "positions", "segment_ids")
    expected = dict.fromkeys(names, ("int32", (2, 8))) | {"weights": ("float32", (2, 8))}
    assert kinds == expected | {f"encoder_{n}": ("int32", (2, 6)) for n in names if n != "targets"}
    assert not batch["encoder_segment_ids"][:, 5:].any() and not batch["weights"][:, 6:].any()


def test_every_epoch_has_every_pair_once(pairs_config: Callable[..., Config], some_pairs: Pairs) -> None:
    config = replace(pairs_config(some_pairs, sequence_length=100), train={"batch_size": 1})
    prepared = ready(config)
    size = split_of(prepared).num_windows
    epochs = []
    for epoch in range(3):
        batches = [train_batch(config, prepared, step) for step in range(epoch * size, (epoch + 1) * size)]
        epochs.append([pair for batch in batches for pair in decoded(prepared, {k: v[0] for k, v in batch.items()})])
    validation = [
        pair
        for batch in validation_batches(config, prepared, [0])
        for pair in decoded(prepared, {k: v[0] for k, v in batch.items()})
    ]
    assert num_validation_batches(config, prepared) == split_of(prepared, "validation").num_windows
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(epochs[2])
    assert Counter(epochs[0] + validation) == Counter(some_pairs)
    assert epochs[0] != epochs[1] != epochs[2], "the rows come in another order"


def digest(batches: Sequence[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(name.encode() + batch[name].tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_batch_is_the_same_for_any_number_of_processes_and_after_a_resume(
    pairs_config: Callable[..., Config], some_pairs: Pairs, num_processes: int
) -> None:
    config = replace(pairs_config(some_pairs, sequence_length=100), train={"num_steps": 12, "batch_size": 4})
    prepared, size = ready(config), 4 // num_processes
    whole = [train_batch(config, prepared, step) for step in range(12)]
    assert len({digest([batch]) for batch in whole}) == 12
    for begin in (0, 7):
        parts = [
            list(train_batches(config, prepared, begin, range(i * size, (i + 1) * size))) for i in range(num_processes)
        ]
        joined = [
            {name: np.concatenate([part[name] for part in batch]) for name in batch[0]}
            for batch in zip(*parts, strict=True)
        ]
        assert digest(joined) == digest(whole[begin:])


def test_the_order_within_rows_does_not_follow_the_corpus(pairs_config: Callable[..., Config]) -> None:
    pairs = [(f"s{number:03}", f"t{number:03}") for number in range(400)]
    prepared = ready(pairs_config(pairs, [("a", "b")], sequence_length=50))
    split = split_of(prepared)
    rows = [[int(s[1:]) for s, _ in decoded(prepared, split.window(n))] for n in range(split.num_windows)]
    assert {len(row) for row in rows} == {10}
    # Of 400 examples in random rows of ten, nine share a row with a given one: 9 of the 399 pairs of neighbours.
    neighbours = sum(number + 1 in row for row in rows for number in row)
    assert neighbours < 9 + 4 * 3
    assert abs(np.mean([np.std(row) for row in rows]) - 400 / np.sqrt(12)) < 15


def test_given_pairs_are_held_out(pairs_config: Callable[..., Config], some_pairs: Pairs) -> None:
    held_out = [("one", "eins"), ("two", "zwei"), *some_pairs[:3]]
    config = pairs_config(some_pairs, held_out, sequence_length=100)
    prepared = ready(config)
    for name, expected in (("train", some_pairs), ("validation", held_out)):
        split = split_of(prepared, name)
        found = [pair for number in range(split.num_windows) for pair in decoded(prepared, split.window(number))]
        assert sorted(found) == sorted(expected)
    apart = prepare_apart(config, False)
    assert (apart.fingerprint, apart.sources) == (prepared.fingerprint, prepared.sources)


def test_several_files_follow_each_other_as_they_are_named(pairs_config: Callable[..., Config], tmp_path: Path) -> None:
    parts = {"b.de": "b1\nb2\r\n", "a.de": "a1\na2\na3", "one.en": "B1\nB2\nA1\n", "two.en": "A2\nA3\n"}
    for name, text in parts.items():
        (tmp_path / name).write_text(text, newline="")
    source, target = (
        tuple(str(tmp_path / name) for name in names) for names in (("b.de", "a.de"), ("one.en", "two.en"))
    )
    prepared = ready(pairs_config(source_path=source, target_path=target, validation_documents=0.5))
    found = []
    for split in (split_of(prepared), split_of(prepared, "validation")):
        found += [pair for number in range(split.num_windows) for pair in decoded(prepared, split.window(number))]
    assert sorted(found) == [("a1", "A1"), ("a2", "A2"), ("a3", "A3"), ("b1", "B1"), ("b2", "B2")]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "tfds"])
def test_pairs_of_records(
    pairs_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    expected = [(f"große {number}", f"big {number}") for number in range(40)]
    records = [{"de": source, "en": target, "id": 1} for source, target in expected]
    fields = {"source_field": "de", "target_field": "en", "validation_documents": 0.3}
    if kind == "tfds":
        monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
        config = pairs_config(source=("tfds:tiny_translate",), **fields)
    else:
        path = tmp_path / f"pairs.{kind}"
        if kind == "jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        config = pairs_config(path=(str(path),), **fields)
    prepared = ready(config)
    found = []
    for split in (split_of(prepared), split_of(prepared, "validation")):
        found += [pair for number in range(split.num_windows) for pair in decoded(prepared, split.window(number))]
    assert sorted(found) == sorted(expected)
    other = prepare(replace(config, data={"source_field": "en", "target_field": "de"}), False)
    assert other.fingerprint != prepared.fingerprint
    row = split_of(other).window(0)
    assert decoded(other, row)[0][0].startswith("big")


def test_a_path_replaces_the_files_of_a_recipe(pairs_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(f'{{"source": "s{n}", "target": "t{n}"}}\n' for n in range(30)))
    prepared = ready(pairs_config([("a", "b")], [("c", "d")], path=(str(tmp_path / "more.jsonl"),)))
    found = []
    for split in (split_of(prepared), split_of(prepared, "validation")):
        found += [pair for number in range(split.num_windows) for pair in decoded(prepared, split.window(number))]
    assert sorted(found) == sorted((f"s{n}", f"t{n}") for n in range(30))


def test_one_tokenizer_is_trained_on_both_sides(pairs_config: Callable[..., Config]) -> None:
    pairs = [("katzen und hunde", "cats and dogs")] * 60
    held_out = [("vögel und mäuse", "birds and mice")]
    tokenizer = prepare(pairs_config(pairs, held_out, tokenizer="bpe", tokenizer_vocab_size=290), False).tokenizer
    for text in ("katzen und hunde", "cats and dogs"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert len(tokenizer.encode(text)) < 0.6 * len(text)
    assert len(tokenizer.encode("birds")) == 5, "held-out texts are none to learn from"


def test_what_is_too_long_is_left_out_and_told(
    pairs_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        ("a" * 7, "b"),
        ("a" * 8, "b"),
        ("c", "d" * 9),
        ("c", "d" * 10),
        ("", "e"),
        ("f" * 20, "g" * 20),
        ("h", ""),
    ]
    config = pairs_config(pairs, [("x", "y")], sequence_length=10, source_length=8)
    for _ in range(2):  # also when everything is there already
        prepared = with_examples(prepare(config), objective_of(config), config)
        error = capfd.readouterr().err
        assert "2 examples of local_pairs have an empty text: they are left out" in error
        expected = (
            "3 of 5 train examples of local_pairs are longer than data.source_length = 8 or data.sequence_length = 10"
        )
        assert f"{expected}: they are left out, number 2 as the first" in error
    split = split_of(prepared)
    found = [pair for number in range(split.num_windows) for pair in decoded(prepared, split.window(number))]
    assert sorted(found) == [("a" * 7, "b"), ("c", "d" * 9)]
    with pytest.raises(
        ConfigError,
        match=r"train split of local_pairs has no example .* data\.source_length = 1 or data\.sequence_length = 1",
    ):
        prepare(replace(config, data={"sequence_length": 1, "source_length": 1}), False)


def test_mistakes_in_pairs(pairs_config: Callable[..., Config], tmp_path: Path) -> None:
    for name, text in (("three", "1\n2\n3\n"), ("five", "1\n2\n3\n4\n5\n"), ("latin", "a\nb\xe9\nc\n")):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    three, five, latin = (str(tmp_path / name) for name in ("three", "five", "latin"))
    with pytest.raises(
        ConfigError, match=r"source_path \(.*three\) have 3 lines and those of data.target_path \(.*five\) 5:"
    ):
        prepare(pairs_config(source_path=(three,), target_path=(five,)), False)
    with pytest.raises(ConfigError, match=r"source_path \(.*five .*three\) have 8 lines and .*\(.*three\) 3:"):
        prepare(pairs_config(source_path=(five, three), target_path=(three,)), False)
    with pytest.raises(ConfigError, match=r"latin is not UTF-8: byte 0xe9 at offset 3 "):
        prepare(pairs_config(source_path=(three,), target_path=(latin,)), False)
    with pytest.raises(ConfigError, match=r"data\.target_path = '/nowhere': does not exist"):
        prepare(pairs_config(source_path=(three,), target_path=("/nowhere",)), False)
    with pytest.raises(
        ConfigError, match=r"three: pairs come from .*records in \.jsonl, \.parquet, \.csv or \.tsv files"
    ):
        prepare(pairs_config(path=(three,)), False)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"source": "a", "target": "b"}\n{"source": "a", "text": "b"}\n')
    with pytest.raises(ConfigError, match=r"data\.target_field = 'target': .*line 2, has the fields source, text"):
        prepare(pairs_config(path=(str(path),)), False)
    with pytest.raises(ConfigError, match=r"none of the 3 documents of local_pairs fall .*; change it$"):
        prepare(pairs_config(source_path=(three,), target_path=(three,), validation_documents=0.0), False)


def test_what_decides_the_rows_decides_the_fingerprint(pairs_config: Callable[..., Config], some_pairs: Pairs) -> None:
    config = pairs_config(some_pairs, sequence_length=100)
    first = prepare(config, False).fingerprint
    found = {first}
    changes = (
        {"sequence_length": 101},
        {"source_length": 99},
        {"tokenizer": "characters"},
        {"validation_documents": 0.3},
    )
    for change in changes:
        found.add(prepare(replace(config, data=change), False).fingerprint)
    found.add(prepare(pairs_config(some_pairs, some_pairs[:5], sequence_length=100), False).fingerprint)
    assert len(found) == 6
    for same in ({"source_length": 100}, {"shuffle": False}, {"num_workers": 2}):
        assert prepare(replace(pairs_config(some_pairs, sequence_length=100), data=same), False).fingerprint == first


@pytest.mark.slow
def test_killed_twice_gives_the_same_bytes(
    pairs_config: Callable[..., Config],
    tmp_path: Path,
    random_text: Callable[[int, int], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = [(" ".join(random_text(n, 20).split()), " ".join(random_text(-n, 20).split())) for n in range(1, 250)]
    config = pairs_config(pairs, num_workers=2, sequence_length=256, tokenizer="bpe", tokenizer_vocab_size=330)
    whole = replace(config, data={"cache_dir": str(tmp_path / "whole"), "num_workers": 1})
    monkeypatch.setattr(preparing, "SHARD_BYTES", 1000)
    prepare(whole, False)
    never_killed = contents(tmp_path / "whole")
    num_shards = sum(name.endswith("array_record") for name in never_killed)
    assert num_shards > 30
    shards = kill_twice(config, tmp_path, num_shards, seed=3)
    finish(start(config, tmp_path))
    assert contents(tmp_path / "cache") == never_killed
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "finished shards were written again"

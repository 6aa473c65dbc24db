"""`transformer predict`: what a file's records are given is what the model says of each alone."""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TOKENIZER, build

from transformer import cli
from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.run import CHECKPOINTS
from transformer.config import CheckpointConfig, Config, ConfigError, replace, to_json
from transformer.data.answers import Passage
from transformer.data.tokenizers import BOS, EOS
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer, apply

TEXTS = ["abc", "h g f e d c b a", "b", "dead beef", "a cab", "face"]
Predict = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_device: None) -> Predict:
    """Returns a function from an objective, the name and text of a file, labels, and keys of `data` and `model` to what is
    predicted, by a run that holds the model of `tiny.build`."""
    monkeypatch.chdir(tmp_path)

    def run(task: str, name: str, text: str, labels: tuple[str, ...] = (), **changes: Any) -> list[dict[str, Any]]:
        model, params = build(**changes.get("model", {}))
        config = replace(
            Config(),
            model=dataclasses.asdict(model.config),
            data={"tokenizer": "characters", "sequence_length": 24, "path": ("x.jsonl",)} | changes.get("data", {}),
            objective={"name": task} | changes.get("objective", {}),
            train={"batch_size": 2},
            parallel={"fsdp": 1},
            compilation_cache_dir="",
        )
        Path("run").mkdir()
        Path("run/config.json").write_text(to_json(config))
        Path("run/corpus.json").write_text(json.dumps({"fingerprint": "x", "labels": labels}))
        TOKENIZER.save(Path("run/tokenizer"))
        with Checkpoints(Path("run") / CHECKPOINTS, CheckpointConfig()) as checkpoints:
            checkpoints.save(1, params, {"step": jnp.int32(1)})
            checkpoints.wait()
        Path(name).write_text(text)
        flags = ["--workdir", "run", "--input", name, "--output", "out.jsonl", "--batch-size", "4"]
        assert cli.run(["predict", *flags, *changes.get("flags", ())]) == 0
        return [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]

    return run


def alone(changes: dict[str, Any], *texts: str) -> tuple[np.ndarray, np.ndarray]:
    """The hidden states' logits over labels, and the ids, of one record by itself."""
    model, params = build(**changes)
    ids = [BOS]
    for text in texts:
        ids += [*TOKENIZER.encode(text).tolist(), EOS]
    return np.asarray(logits_of(model, params, row_of(ids)))[0, : len(ids)], np.array(ids)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: Transformer, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    outputs = apply(model, params, batch)
    return outputs.logits(outputs.hidden)


def row_of(ids: list[int], name: str = "", length: int = 32) -> dict[str, jax.Array]:
    """A text by itself, in a row of one length, so that one compilation serves all."""
    padding = [0] * (length - len(ids))
    row = {"inputs": ids + padding, "positions": [*range(len(ids)), *padding], "segment_ids": [1] * len(ids) + padding}
    return {name + key: jnp.asarray(values)[None] for key, values in row.items()}


@pytest.mark.parametrize("architecture", ["encoder", "decoder"])
def test_classes_have_names_and_probabilities(
    predict: Predict, architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of pairs of texts, from a table, in its order; and what is right is counted."""
    names, model = ("bad", "fine", "good"), {"architecture": architecture, "num_labels": 3}
    table = "text,label,other\n" + "".join(f"{text},{names[n % 3]},{text[:2]}\n" for n, text in enumerate(TEXTS))
    found = predict("sequence_classification", "in.csv", table, names, model=model, data={"second_text_field": "other"})
    right = 0
    for number, (text, result) in enumerate(zip(TEXTS, found, strict=True)):
        assert result["text"] == text and result["other"] == text[:2]
        logits, _ = alone(model, text, text[:2])
        expected = np.asarray(jax.nn.softmax(logits[0 if architecture == "encoder" else -1]))
        assert list(result["probabilities"]) == list(names)
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-4)
        assert result["prediction"] == names[int(np.argmax(expected))]
        right += result["prediction"] == names[number % 3]
    assert f"6 of 6 records say what is right: accuracy {right / 6:.4f}, f1 macro" in capsys.readouterr().err


def test_words_and_what_was_cut(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"architecture": "encoder", "num_labels": 2}
    words = [["ab", "c"], ["a"] * 20]
    lines = "".join(json.dumps({"text": part}) + "\n" for part in words)
    first, second = predict("token_classification", "in.jsonl", lines, model=model)
    logits, _ = alone(model, "ab c")
    assert first["prediction"] == np.argmax(logits[[1, 3]], axis=-1).tolist()
    assert len(second["prediction"]) == 20 and second["prediction"][-1] is None
    assert second["prediction"][10] in (0, 1)
    assert "1 of 2 texts were longer than the model's rows: cut" in capsys.readouterr().err


def test_numbers_are_told_by_the_mean(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"architecture": "encoder", "num_labels": 1}
    table = "text\tlabel\n" + "".join(f"{text}\t{n}\n" for n, text in enumerate(TEXTS))
    found = predict("regression", "in.tsv", table, model=model, objective={"pooling": "mean"})
    for text, result in zip(TEXTS, found, strict=True):
        # The head is linear, so that the mean of its outputs is its output of the mean.
        assert result["prediction"] == pytest.approx(float(alone(model, text)[0][:, 0].mean()), abs=1e-4)
    predicted = [result["prediction"] for result in found]
    assert f"pearson {np.corrcoef(predicted, range(6))[0, 1]:.4f}" in capsys.readouterr().err


def test_answers_stand_where_they_say(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    """In a passage that fits, and in one that is read in pieces."""
    model = {"architecture": "encoder", "num_labels": 2}
    passages = ["a b c", "abc def gah bed cab fad egg hag ace bag"]
    records = [
        {"text": "ab", "other": text, "label": {"text": ["b"], "answer_start": [text.index("b")]}} for text in passages
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    flags = ("--batch-size", "1")
    found = predict("span_extraction", "in.jsonl", lines, model=model, data={"second_text_field": "other"}, flags=flags)
    for passage, result in zip(passages, found, strict=True):
        if result["prediction"]:
            assert passage[result["start"] :].startswith(result["prediction"]) and result["margin"] >= 0
        else:
            assert result["start"] is None
    logits, ids = alone(model, "ab", passages[0])
    places = np.arange(4, len(ids) - 1)
    sums = {(a, b): logits[a, 0] + logits[b, 1] for a in places for b in places if a <= b}
    best = max(sums, key=lambda span: sums[span])
    nothing = logits[0].sum()
    expected = "" if nothing > sums[best] else Passage(passages[0], TOKENIZER).words(int(best[0]) - 4, int(best[1]) - 4)
    assert found[0]["prediction"] == expected
    assert abs(found[0]["margin"]) == pytest.approx(abs(nothing - sums[best]), abs=2e-3)
    assert "2 of 2 records say what is right: exact match" in capsys.readouterr().err


def test_words_for_labels_are_ranked(predict: Predict) -> None:
    model = {"architecture": "encoder_decoder"}
    data = {"source_field": "text", "target_field": "label", "source_prefix": "a: ", "label_words": ("0=bad", "1=good")}
    data |= {"label_words": ("0=bad", "1=egg h")}
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3])
    found = predict("text_to_text", "in.jsonl", lines, model=model, data=data)
    network, params = build(**model)
    for text, result in zip(TEXTS, found, strict=False):
        source = [*TOKENIZER.encode("a: " + text).tolist(), EOS]
        sums = []
        for word in ("bad", "egg h"):
            ids = [BOS, *TOKENIZER.encode(word).tolist(), EOS]
            logits = logits_of(network, params, row_of(ids[:-1]) | row_of(source, "encoder_"))
            logs = np.asarray(jax.nn.log_softmax(logits))[0]
            sums.append(logs[np.arange(len(ids) - 1), ids[1:]].sum())
        expected = np.asarray(jax.nn.softmax(jnp.asarray(sums)))
        np.testing.assert_allclose(list(result["probabilities"].values()), expected, atol=1e-4)
        assert result["prediction"] == ("bad", "egg h")[int(np.argmax(expected))]


@pytest.mark.parametrize(
    ("name", "text", "flags", "message"),
    [
        ("in.csv", "text,label\n", (), "--input = 'in.csv': is empty, so there is nothing to predict"),
        ("in.csv", "texts,label\na,0\n", (), "data.text_field = 'text': in.csv, line 2, has the fields label, texts"),
        ("in.csv", "text,label\na,7\n", (), "data.label_field = 'label': the model knows no label 7, only 0, 1"),
        ("in.csv", "text,label\na,1\n,0\n", (), "in.csv, line 3, has no text in 'text'"),
        ("in.csv", "text\na\n", ("--input", "no.csv"), "--input = 'no.csv': does not exist, or is no file"),
        ("in.csv", "text\na\n", ("--output", "no/out.jsonl"), "the directory no does not exist"),
        ("in.csv", "text\na\n", ("--output", "out.csv"), "must end in .jsonl"),
    ],
)
def test_mistakes(predict: Predict, name: str, text: str, flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        predict("sequence_classification", name, text, model={"architecture": "encoder", "num_labels": 2}, flags=flags)
    assert message in str(error.value) and not list(Path().glob("out*"))


def test_a_model_without_a_task(predict: Predict) -> None:
    with pytest.raises(ConfigError, match="'masked_lm' is no task to predict"):
        predict("masked_lm", "in.txt", "a\n", model={"architecture": "encoder"}, data={"path": ()})

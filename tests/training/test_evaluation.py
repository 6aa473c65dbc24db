"""Validation against a computation of its own: the documents read anew, window by window, summed in double precision."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer import cli
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import load_run
from transformer.config import Config, replace
from transformer.data.division import split_texts
from transformer.data.prepare import prepare
from transformer.data.tokenizers import BOS, EOS
from transformer.models.transformer import apply
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.evaluation import Evaluator

Make = Callable[..., Config]


@pytest.fixture
def trained(make_run: Make, tmp_path: Path) -> tuple[Config, Path]:
    config = make_run(train={"num_steps": 6}, evaluation={"every_steps": 3})
    assert loop.run(config, tmp_path / "run") == 0
    return load_run(tmp_path / "run").config, tmp_path / "run"


def windows(documents: list[np.ndarray], length: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the windows of documents one after another, told apart by segments; each target comes once."""
    stream = np.concatenate(documents)
    owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
    place = np.concatenate([np.arange(len(document)) for document in documents])
    for begin in range(0, len(stream) - 1, length):
        end = min(begin + length, len(stream) - 1)
        first = np.where(owner[begin:end] == owner[begin], place[begin], 0)
        yield {
            "inputs": stream[begin:end][None],
            "targets": stream[begin + 1 : end + 1],
            "positions": (place[begin:end] - first)[None],
            "segment_ids": (owner[begin:end] - owner[begin] + 1)[None],
            "weights": owner[begin:end] == owner[begin + 1 : end + 1],
        }


def test_validation_is_that_of_the_whole_split_computed_by_hand(trained: tuple[Config, Path]) -> None:
    config, workdir = trained
    texts = list(split_texts(config, "validation"))
    assert len(texts) > 2
    documents = [np.array([BOS, *(4 + byte for byte in text.encode()), EOS], np.int32) for text in texts]
    mesh = make_mesh(config, jax.devices()[:1])
    model, params, _ = load_parameters(load_run(workdir), mesh)
    total, right, count = 0.0, 0, 0
    logits_of = jax.jit(lambda batch: (outputs := apply(model, params, batch)).logits(outputs.hidden)[0])
    for window in windows(documents, config.data.sequence_length):
        batch = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        logits = np.asarray(logits_of(batch), np.float64)[:, : config.model.vocab_size]
        log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        chosen = log_probabilities[np.arange(len(logits)), window["targets"]]
        total -= chosen[window["weights"]].sum()
        right += int((logits.argmax(-1) == window["targets"])[window["weights"]].sum())
        count += int(window["weights"].sum())
    num_bytes = sum(len(text.encode()) for text in texts)
    # Every byte is a target, and so is the end of each document.
    assert count == num_bytes + len(texts)

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert (last["step"], last["split"], last["tokens"]) == (6, "validation", count)
    assert last["cross_entropy"] == pytest.approx(total / count, rel=1e-6)
    assert last["loss"] == last["cross_entropy"]
    assert last["accuracy"] == pytest.approx(right / count, abs=1e-9)
    assert last["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-6)


def test_neither_batches_nor_the_mesh_change_the_result(trained: tuple[Config, Path]) -> None:
    config, workdir = trained
    expected = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    for batch_size, parallel, num_devices in ((8, {}, 8), (1000, {"tensor": 2}, 8), (3, {}, 1)):
        size = {"batch_size": batch_size}
        changed = replace(config, evaluation=size, train=size, parallel=parallel)
        mesh = make_mesh(changed, jax.devices()[:num_devices])
        with jax.set_mesh(mesh):
            model, params, _ = load_parameters(load_run(workdir), mesh)
            result = Evaluator(changed, prepare(changed), model, mesh)(params)
        assert result["tokens"] == expected["tokens"]
        for name in ("loss", "cross_entropy", "accuracy", "bits_per_byte"):
            assert result[name] == pytest.approx(expected[name], rel=1e-6)


def test_a_part_of_the_split_can_be_enough(trained: tuple[Config, Path]) -> None:
    config, workdir = trained
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        model, params, _ = load_parameters(load_run(workdir), mesh)
        results = []
        for num_batches in (1, 2, 0):
            part = replace(config, evaluation={"num_batches": num_batches, "batch_size": 8})
            results.append(Evaluator(part, prepare(part), model, mesh)(params))
    assert 0 < results[0]["tokens"] < results[1]["tokens"] < results[2]["tokens"]
    for result in results:
        # The rate of tokens to bytes is that of the whole split.
        rate = result["bits_per_byte"] / result["cross_entropy"]
        assert rate == pytest.approx(results[2]["bits_per_byte"] / results[2]["cross_entropy"])


def test_the_z_loss_is_part_of_the_loss_and_not_of_the_cross_entropy(make_run: Make, tmp_path: Path) -> None:
    """What the model adds of its own, to learn to share its work among experts, is no part of validation's loss."""
    experts = {"layers": "attention/experts", "num_experts": 2, "experts_per_token": 1, "balance_loss": 0.1}
    config = make_run(objective={"z_loss": 0.1}, model=experts, train={"num_steps": 2}, evaluation={"every_steps": 0})
    assert loop.run(config, tmp_path / "run") == 0
    *_, train, last = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (train, last):
        assert line["z_loss"] > 0.1 and line["balance_loss"] > 0.09 and line["expert_max_load"] >= 1
        own = line["balance_loss"] if line is train else 0
        assert line["loss"] == pytest.approx(line["cross_entropy"] + line["z_loss"] + own)
    plain = last["cross_entropy"] / math.log(2)
    assert last["bits_per_byte"] / plain == pytest.approx(1.05, abs=0.05)


def test_the_verb_says_what_the_loop_said(
    trained: tuple[Config, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, workdir = trained
    monkeypatch.setattr("transformer.parallel.startup.start", lambda config: None)
    capsys.readouterr()
    assert cli.run(["evaluate", "--workdir", str(workdir), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert result["step"] == last["step"] == 6
    for name in ("loss", "cross_entropy", "accuracy", "bits_per_byte", "tokens"):
        assert result[name] == last[name]

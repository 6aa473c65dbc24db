"""The step that is timed is the one that trains, of every objective; what is reported of it adds up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer import cli
from transformer.benchmarks import program, roofline
from transformer.benchmarks.measure import Measurement, Result
from transformer.benchmarks.program import Program, made_up, make_program
from transformer.checkpointing.run import resolve
from transformer.config import Config, ConfigError, replace
from transformer.models import flops
from transformer.objectives import OBJECTIVES, objective_of, with_window
from transformer.parallel import startup

TINY: dict[str, Any] = {
    "data": {"tokenizer": "bytes", "sequence_length": 16},
    "model": {"num_layers": 1, "width": 16, "num_heads": 2, "scan_layers": False},
    "train": {"batch_size": 8, "num_steps": 100},
    "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
    "compilation_cache_dir": "",
}
FLAGS = ["--data.tokenizer", "bytes", "--data.sequence-length", "16", "--model.num-layers", "1", "--model.width", "16"]
FLAGS += ["--model.num-heads", "2", "--train.batch-size", "8", "--compilation-cache-dir", "", "--rounds", "3"]
NEEDS: dict[str, dict[str, Any]] = {
    "masked_lm": {"model": {"architecture": "encoder"}},
    "multi_token": {"model": {"num_future_tokens": 1}},
    "span_corruption": {"model": {"architecture": "encoder_decoder"}},
    "mixture_of_denoisers": {"model": {"architecture": "encoder_decoder"}},
    "seq2seq": {
        "model": {"architecture": "encoder_decoder"},
        "data": {"source_path": ("a",), "target_path": ("b",)},
    },
    "sequence_classification": {"data": {"path": ("a.jsonl",)}},
    "token_classification": {"data": {"path": ("a.jsonl",)}},
    "regression": {"data": {"path": ("a.jsonl",)}},
    "span_extraction": {"data": {"path": ("a.jsonl",), "second_text_field": "b"}},
    "text_to_text": {"model": {"architecture": "encoder_decoder"}, "data": {"path": ("a.jsonl",)}},
    "associative_recall": {"objective": {"num_pairs": 4}},
}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


def config_of(objective: str = "causal", **changes: Any) -> Config:
    config = replace(Config(), **TINY, objective={"name": objective})
    return replace(replace(config, **NEEDS.get(objective, {})), **changes)


@pytest.fixture(scope="module")
def tiny() -> Program:
    return make_program(config_of())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_is_what_the_objective_asks_for(name: str) -> None:
    config = resolve(with_window(config_of(name)), 260, 2)
    batch, arrays = made_up(config), objective_of(config).arrays(config)
    assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
        key: ((8, length), dtype) for key, (length, dtype) in arrays.items()
    }
    labels = config.model.num_labels
    assert batch.get("targets", np.zeros(1)).max() < (labels or config.model.vocab_size or 0)
    assert batch["weights"].all() and batch["segment_ids"].all()
    assert np.array_equal(batch["positions"][0], np.arange(batch["positions"].shape[1]))


def test_it_trains(tiny: Program) -> None:
    """On one batch again and again, the loss falls from that of chance."""
    losses = [float(tiny()["loss"]) for _ in range(30)]
    assert losses[0] == pytest.approx(np.log(260), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def test_classifiers_without_data_have_the_fewest_labels() -> None:
    assert make_program(config_of("sequence_classification")).config.model.num_labels == program.FEWEST_LABELS


def test_counts_are_those_of_the_model(tiny: Program) -> None:
    parts = flops.forward_flops(tiny.config.model, 16)
    full = parts.pop("attention_scores")
    assert tiny.flops(True) == 3 * 8 * sum(parts.values())
    assert tiny.flops(False) == 3 * 8 * (sum(parts.values()) - parts["attention_scores_causal"] + full)
    assert (
        tiny.num_tokens == 8 * 16
        and tiny.memory["peak"] >= tiny.memory["arguments"] > 4 * tiny.num_parameters / jax.device_count()
    )


@pytest.mark.parametrize(("remat", "again"), [("none", ()), ("dots", ("scores",)), ("full", ("scores", "rest"))])
def test_what_is_computed_again_counts_for_the_hardware_alone(
    remat: str, again: tuple[str, ...], tiny: Program
) -> None:
    config = replace(tiny.config, model={"remat": remat})
    parts = flops.forward_flops(config.model, 16)
    scores = parts.pop("attention_scores_causal")
    rest = sum(parts.values()) - parts["attention_scores"] - parts["logits"]
    expected = 8 * sum({"scores": scores, "rest": rest}[name] for name in again)
    assert dataclasses.replace(tiny, config=config).recomputed_flops == expected


def test_a_result_is_printed_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MFU is there where the peak is known, and is not guessed where it is not."""
    path, trace = tmp_path / "a.json", tmp_path / "trace"
    assert cli.run(["benchmark", "step", *FLAGS, "--json", str(path), "--profile", str(trace)]) == 0
    told, record = capsys.readouterr().out, json.loads(path.read_text())
    assert "no MFU: the peak of 'cpu' is not known" in told and "tokens per second: " in told
    assert "layer_0" in told.partition("the slowest operations")[2]
    assert list(trace.rglob("*.xplane.pb"))
    assert record["machine"]["num_devices"] == jax.device_count() and record["subject"]["tokens"] == 128
    rates, seconds = (record["measurements"][name]["values"] for name in ("tokens_per_second", "step_seconds"))
    losses = record["facts"]["losses"]
    assert len(losses) == 3 + 3 and losses[-1] < losses[0] == pytest.approx(np.log(260), rel=0.05)
    assert f"loss of the first step {losses[0]:.6f}, of the last {losses[-1]:.6f}" in told
    assert len(seconds) == 3 and rates == pytest.approx([128 / each for each in seconds])
    assert "mfu_attention_causal_half" not in record["measurements"]

    monkeypatch.setitem(flops.PEAK_FLOPS, "cpu", 1e12)
    assert cli.run(["benchmark", "step", *FLAGS, "--json", str(path), "--model.remat", "full"]) == 0
    assert "no MFU" not in capsys.readouterr().out
    record = json.loads(path.read_text())
    shares = {name: record["measurements"][name]["values"][0] for name in record["measurements"]}
    per_second = record["facts"]["model_flops_attention_causal_half"] / shares["step_seconds"]
    assert shares["mfu_attention_causal_half"] == pytest.approx(per_second / 1e12 / jax.device_count())
    assert shares["mfu_attention_causal_half"] < shares["mfu_attention_in_full"] < shares["hfu"]


def test_the_roofline_places_the_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(roofline, "BYTES", {"cpu": 2**16})
    path = tmp_path / "a.json"
    assert cli.run(["benchmark", "roofline", *FLAGS, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert set(record["facts"]["products"]) == {"product of 16", "product of 32"}
    assert record["facts"]["step_bytes"] > 4 * 16 * 260 and record["facts"]["step_flops"] > 0
    assert {name: item["unit"] for name, item in record["measurements"].items()} == {
        "products": "FLOP/s",
        "memory": "bytes/s",
        "step_flops_per_second": "FLOP/s",
    }
    told = capsys.readouterr().out
    assert "the ridge is at" in told and "of which it reaches" in told


@pytest.mark.parametrize(("bandwidth", "bound"), [(1e9, "memory"), (1e15, "products")])
def test_the_lower_ceiling_is_the_one_that_counts(bandwidth: float, bound: str) -> None:
    measured = {
        "products": (1e12, "FLOP/s"),
        "memory": (bandwidth, "bytes/s"),
        "step_flops_per_second": (1e10, "FLOP/s"),
    }
    found = {name: Measurement((value,), unit) for name, (value, unit) in measured.items()}
    machine = {"num_devices": 1, "device_kind": "cpu", "processor": "x"}
    facts = {"fastest_product": "product of 2", "step_flops": 100.0, "step_bytes": 10.0}
    told = roofline.text_of(Result("roofline", {"compute_dtype": "float32"}, machine, found, facts))
    share = 1e10 / min(1e12, 10 * bandwidth)
    assert f"its ceiling is that of {bound}, " in told and f"of which it reaches {share:.0%}" in told


def test_a_trace_that_cannot_be_written_is_told_before_anything_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--profile = .*Not a directory"):
        cli.run(["benchmark", "step", *FLAGS, "--profile", str(tmp_path / "file" / "trace")])
    assert "compiled" not in capsys.readouterr().out

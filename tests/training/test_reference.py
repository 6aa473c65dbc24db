"""A run that learns from preferences: what the model that it begins with makes of them, computed once and kept."""

import dataclasses
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.config import Config, ConfigError
from transformer.data.prepare import prepare
from transformer.objectives import with_window
from transformer.parallel import sharding
from transformer.training import loop
from transformer.training.reference import FILE, stored


def preferences(make_run: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run of six steps on one device."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(loop, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))
    records = [{"prompt": f"{n}", "chosen": "ab" * (1 + n % 3), "rejected": "cd"} for n in range(60)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return make_run(
        data={"path": (str(path),), "sequence_length": 32, "validation_documents": 0.2},
        objective={"name": "dpo", "dpo_beta": 1.0},
        train={"num_steps": 6},
        evaluation={"every_steps": 3, "sample_tokens": 0},
        parallel={"fsdp": 1},
    )


def test_the_margin_rises_from_nothing_and_a_run_goes_on_with_the_reference_that_it_began_with(
    make_run: Callable[..., Config],
    tmp_path: Path,
    read_lines: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = preferences(make_run, tmp_path, monkeypatch)
    run = tmp_path / "run"
    assert loop.run(config, run) == 0
    lines = read_lines(run)
    trained = [line for line in lines if line["split"] == "train"]
    np.testing.assert_allclose(trained[0]["loss"], np.log(2), rtol=1e-6)
    assert trained[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert trained[5]["reward_margin"] > trained[3]["reward_margin"] > trained[1]["reward_margin"] > 0.1
    validated = [line for line in lines if line["split"] == "validation"]
    assert len(validated) == 2 and validated[1]["loss"] < validated[0]["loss"] < np.log(2)
    assert validated[1]["preferred"] == 1

    # A run that goes on reads what it began with.
    prepared = prepare(with_window(config), False)
    (source,) = stored(prepared, run).sources
    for split in (source.train, source.validation):
        windows = [split.window(number) for number in range(split.num_windows)]
        assert all(len(w["reference"]) == w["segment_ids"].max() and np.all(w["reference"] < 0) for w in windows)
    with pytest.raises(ConfigError, match=rf"{FILE} is of other data"):
        stored(dataclasses.replace(prepared, fingerprint="x"), run)
    with pytest.raises(ConfigError, match=rf"has no {FILE}, which says how probable the first model found its data"):
        stored(prepared, tmp_path)


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    make_run: Callable[..., Config],
    tmp_path: Path,
    assert_same_run: Callable[[Path, Path], None],
    signal_after: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = preferences(make_run, tmp_path, monkeypatch)
    assert loop.run(config, tmp_path / "whole") == 0
    with monkeypatch.context():
        signal_after(2, signal.SIGTERM)
        assert loop.run(config, tmp_path / "stopped") == 143
    monkeypatch.undo()
    preferences(make_run, tmp_path, monkeypatch)
    assert loop.run(config, tmp_path / "stopped") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")

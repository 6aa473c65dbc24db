"""Runs that begin with the parameters of others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformer.config import Config, ConfigError, from_json, replace
from transformer.training import loop

Make = Callable[..., Config]


def test_a_cooldown_equals_the_uninterrupted_run(
    make_run: Make, tmp_path: Path, read_state: Any, read_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs with constant phases that coincide; from a step of the longer one the end of the shorter one is computed."""
    wsd = {"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.5, "final_ratio": 0.0}
    whole = make_run(optimizer=wsd, train={"num_steps": 8})
    assert loop.run(whole, tmp_path / "whole") == 0
    long = make_run(optimizer=wsd | {"decay_share": 0.25}, train={"num_steps": 16}, checkpoint={"keep_latest": 9})
    assert loop.run(long, tmp_path / "long") == 0
    start = {"run": str(tmp_path / "long"), "step": 4, "optimizer": "keep", "progress": "keep"}
    assert loop.run(replace(whole, init_from=start), tmp_path / "branch") == 0

    left, right = read_state(tmp_path / "whole"), read_state(tmp_path / "branch")
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []
    lines = read_lines(tmp_path / "whole")
    after = [line for line in lines if line["step"] > 4]
    assert read_lines(tmp_path / "branch") == after
    assert after[-1]["step"] == 8 and after[0]["learning_rate"] > after[-2]["learning_rate"]
    assert read_lines(tmp_path / "long")[9] != lines[9]
    print(capsys.readouterr().out)

"""A start is timed from outside the process, phase by phase; the second finds what the first left."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer import cli
from transformer.benchmarks.startup import PHASES, first_step
from transformer.config import Config, ConfigError, to_json


@pytest.mark.slow
def test_phases_are_told_cold_and_warm(
    make_run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, path = tmp_path / "recipe.json", tmp_path / "result.json"
    recipe.write_text(to_json(make_run()))
    assert cli.run(["benchmark", "startup", "--config", str(recipe), "--rounds", "1", "--json", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:16].strip() for line in lines] == ["", *PHASES, "to first step"]
    found = {name: item["values"] for name, item in json.loads(path.read_text())["measurements"].items()}
    for name in ("cold", "warm"):
        assert sum(found[f"{name}: {phase}"][0] for phase in PHASES) == pytest.approx(found[name][0])
        assert all(found[f"{name}: {phase}"][0] > 0 for phase in PHASES)


@pytest.mark.slow
def test_a_run_that_fails_is_told(make_run: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the run ended with status 2: error: .*nowhere\.txt"):
        first_step(make_run(data={"path": ("nowhere.txt",)}), tmp_path / "run")

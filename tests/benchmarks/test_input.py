"""The pipeline is read to the end, and its rate set against the step's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from transformer import cli
from transformer.config import Config, to_json
from transformer.parallel import startup


@pytest.mark.slow
def test_batches_are_counted_and_compared_with_the_step(
    make_run: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(startup, "_started", True)
    recipe, path = tmp_path / "recipe.json", tmp_path / "result.json"
    recipe.write_text(to_json(make_run()))
    flags = ["--config", str(recipe), "--rounds", "2", "--batches", "45", "--json", str(path)]
    assert cli.run(["benchmark", "input", *flags]) == 0
    record, told = json.loads(path.read_text()), capsys.readouterr().out
    found = {name: item["values"] for name, item in record["measurements"].items()}
    assert record["facts"]["batches"] == 45 and len(found["tokens_per_second"]) == 20
    assert record["subject"]["tokens"] == 8 * 16 and len(found["step_tokens_per_second"]) == 2
    assert min(found["resident_bytes"]) > 2**26 and min(found["tokens_per_second"]) > 0
    assert "45 batches (" in told and " times as fast" in told and "resident memory" in told

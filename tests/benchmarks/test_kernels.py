"""Everything that mixes tokens here is timed, forward and with its gradient; what cannot or may not run says so."""

import json
from pathlib import Path
from typing import get_args

import pytest

from transformer import cli
from transformer.arguments import exit_status
from transformer.config.implementations import IMPLEMENTATIONS
from transformer.config.model import Mixer
from transformer.parallel import startup

FLAGS = ["--model.width", "32", "--model.num-heads", "2", "--rounds", "1", "--compilation-cache-dir", ""]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


@pytest.mark.slow
def test_all_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    assert cli.run(["benchmark", "kernels", *FLAGS, "--lengths", "16", "--json", str(path)]) == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()[1:]}
    elsewhere = {name for name, it in IMPLEMENTATIONS.items() if "cpu" not in it.platforms}
    assert set(rows) == {*IMPLEMENTATIONS, *get_args(Mixer)[1:]}
    assert all("and this is cpu" in rows[name] for name in elsewhere) and len(elsewhere) == 3
    record = json.loads(path.read_text())
    ran = {label.split(",")[0] for label in record["measurements"]}
    assert ran == set(rows) - elsewhere
    for name in ran:
        assert record["facts"]["bytes"][f"{name}, 16 tokens"] > 0
        parts = [record["measurements"][f"{name}, 16 tokens, {part}"] for part in ("forward", "with gradient")]
        assert all(part["values"][0] > 0 for part in parts)


@pytest.mark.slow
def test_what_needs_too_much_memory_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All pairs of a long text; a mixer with a state needs little more than the text."""
    path = tmp_path / "a.json"
    flags = ["--lengths", "4096", "--only", "reference", "mingru", "--memory", "0.1", "--json", str(path)]
    assert cli.run(["benchmark", "kernels", *FLAGS, *flags]) == 0
    reference, mingru = capsys.readouterr().out.splitlines()[1:]
    assert reference.endswith("not run") and not mingru.endswith("not run")
    assert {label.split(",")[0] for label in json.loads(path.read_text())["measurements"]} == {"mingru"}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--lengths", "0"], "--lengths = 0: must be at least 1"),
        (["--only", "flash"], "--only = 'flash': must be of reference, causal_blocks"),
    ],
)
def test_mistakes(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(cli.run, ["benchmark", "kernels", *FLAGS, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")

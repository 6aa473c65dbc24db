"""Texts of every number and length of prompts are generated and timed, whatever the architecture."""

import json
from pathlib import Path

import pytest

from transformer import cli
from transformer.arguments import exit_status
from transformer.parallel import startup

FLAGS = ["--data.tokenizer", "bytes", "--model.num-layers", "1", "--model.width", "16", "--model.num-heads", "2"]
FLAGS += ["--compilation-cache-dir", "", "--rounds", "2", "--new-tokens", "3"]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
@pytest.mark.slow
def test_each_case_is_timed(architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    objective = {"decoder": "causal", "encoder_decoder": "span_corruption"}[architecture]
    flags = ["--model.architecture", architecture, "--objective.name", objective, "--json", str(path)]
    sizes = ["--batch-sizes", "1", "3", "--prompt-tokens", "4", "5"]
    assert cli.run(["benchmark", "decode", *FLAGS, *sizes, *flags]) == 0
    found = json.loads(path.read_text())["measurements"]
    assert len(found) == 2 * 2 * 3 and all(len(item["values"]) == 2 for item in found.values())
    further, rate = (found[f"batch 3, prompt 5: {part}"]["values"] for part in ("each further", "rate"))
    assert rate == pytest.approx([3 / seconds for seconds in further])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["1", "4"], ["1", "5"], ["3", "4"], ["3", "5"]]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--new-tokens", "1"],
            "--new-tokens = 1: must be at least 2",
        ),
        (
            ["--model.architecture", "encoder", "--objective.name", "masked_lm"],
            "model.architecture = 'encoder': this model writes no text",
        ),
        (
            ["--model.positions", "learned", "--data.sequence-length", "8", "--prompt-tokens", "6"],
            "--prompt-tokens and --new-tokens are more than model.num_positions = 8: give fewer, or --model.num-positions",
        ),
    ],
)
def test_mistakes(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(cli.run, ["benchmark", "decode", *FLAGS, *flags]) == 2
    assert capsys.readouterr().err == f"error: {told}\n"

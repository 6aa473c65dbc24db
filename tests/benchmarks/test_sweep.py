"""What fits is found by compiling, and the fastest of it is what a search through everything finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from transformer import cli
from transformer.arguments import exit_status
from transformer.benchmarks import program, sweep
from transformer.config import from_json
from transformer.parallel import startup

FLAGS = ["--data.tokenizer", "bytes", "--data.sequence-length", "16", "--model.num-layers", "2", "--model.width", "16"]
FLAGS += ["--model.num-heads", "2", "--compilation-cache-dir", "", "--rounds", "2", "--optimizer.warmup-steps", "0"]


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


class Compiled:
    """In the place of a program: twice the batch needs twice the memory and, but for remat, as much time."""

    ran: list[str]

    def __init__(self, config: Any):
        self.config, self.state = config, None
        self.num_tokens = config.train.batch_size * 16
        share = {"none": 4, "dots": 2, "full": 1}[config.model.remat]
        self.memory = {"peak": config.train.batch_size * share * 2**20 + (2**19 if config.model.scan_layers else 0)}

    @property
    def seconds(self) -> float:
        slow = {"none": 1.0, "dots": 1.2, "full": 1.4}[self.config.model.remat]
        return slow * (self.config.train.batch_size + 4) * (1.1 if self.config.model.scan_layers else 1)


@pytest.mark.parametrize("memory", [1, 10, 17, 33, 100])
def test_the_fastest_that_fits_is_found_and_the_rest_not_run(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, ran = [], []

    def make(config: Any) -> Compiled:
        made.append(Compiled(config))
        return made[-1]

    def timed(calls: dict[str, Any], rounds: int, warmup: int) -> dict[str, list[float]]:
        ran.append(calls["step"])
        return {"step": [calls["step"].seconds] * rounds}

    monkeypatch.setattr(program, "make_program", make)
    monkeypatch.setattr(sweep, "timed", timed)
    path, chosen = tmp_path / "a.json", tmp_path / "best.json"
    flags = [*FLAGS, "--batch-sizes", "2", "4", "8", "16", "--memory", str(memory / 1024), "--json", str(path)]
    status = exit_status(cli.run, ["benchmark", "sweep", *flags, "--output", str(chosen)])
    everything = {
        (size, remat, scan): Compiled(
            sweep.replace(made[0].config, train={"batch_size": size}, model={"remat": remat, "scan_layers": scan})
        )
        for size in (2, 4, 8, 16)
        for remat in ("none", "dots", "full")
        for scan in (True, False)
    }
    fitting = {key: each for key, each in everything.items() if each.memory["peak"] <= memory * 2**20}
    if not fitting:
        assert status == 2 and "no setting fits into" in capsys.readouterr().err
        return
    best = max(fitting.values(), key=lambda each: each.num_tokens / each.seconds)
    assert status == 0 and from_json(chosen.read_text()) == best.config
    assert len(ran) == len(fitting) and all(each.memory["peak"] <= memory * 2**20 for each in ran)
    # Of each setting, batches up to the first that does not fit.
    first_too_large = [key for key, each in everything.items() if each.memory["peak"] > memory * 2**20]
    skipped = [key for key in first_too_large if (key[0] // 2, *key[1:]) in first_too_large]
    assert len(made) == len(everything) - len(skipped)
    assert json.loads(path.read_text())["facts"]["best"] == sweep.flags_of(best.config)
    assert capsys.readouterr().out.splitlines()[-1] == f"fastest: {sweep.flags_of(best.config)}"


@pytest.mark.slow
def test_a_real_step_is_timed_in_each_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    flags = ["--batch-sizes", "8", "--remat", "none", "full", "--memory", "1", "--scan", "False", "--json", str(path)]
    assert cli.run(["benchmark", "sweep", *FLAGS, *flags]) == 0
    record = json.loads(path.read_text())
    assert len(record["measurements"]) == 2 and record["facts"]["best"] in record["measurements"]
    assert min(record["facts"]["bytes"].values()) > 0
    # What is printed can be given to `train`.
    words = capsys.readouterr().out.splitlines()[-1].removeprefix("fastest: ").split()
    assert cli.parse(["describe", *words]).config.train.batch_size == 8


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--remat", "som"], "--remat = 'som': must be one of none, dots, full"),
        (["--batch-sizes", "3", "--train.num-microbatches", "2"], "train.batch_size = 3 is not divisible by"),
        (["--rounds", "0"], "--rounds = 0: must be at least 1"),
        ([], "--memory is needed: this device does not say how much it has"),
    ],
)
def test_mistakes(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(cli.run, ["benchmark", "sweep", *FLAGS, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")

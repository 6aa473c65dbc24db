"""What a study is, and how its runs are made: each by `transformer train`, in a process of its own."""

import importlib
import json
import math
import shutil
import signal
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.benchmarks.measure import machine, own_process
from transformer.benchmarks.report import save_plot
from transformer.config import Config, ConfigError, from_json, replace, to_json, write_atomically
from transformer.studies import STUDIES
from transformer.training import DIVERGED
from transformer.training.metrics import read_metrics


@dataclass(frozen=True)
class Trial:
    """One configuration, to be trained once a seed."""

    name: str
    config: Config
    facts: dict[str, Any] = field(default_factory=dict)
    """What of it the study varies."""

    def seeded(self, seed: int) -> Config:
        """Returns the configuration of one run: `{seed}` in data.path stands for the seed."""
        paths = tuple(name.replace("{seed}", str(seed)) for name in self.config.data.path)
        return replace(self.config, seed=seed, data={"path": paths})


@dataclass(frozen=True)
class Outcome:
    """One finished run."""

    name: str
    seed: int
    facts: dict[str, Any]
    parameters: int
    trained_parameters: int
    """Fewer than `parameters` where there is an adapter or `optimizer.frozen`."""
    diverged: bool
    """Whether it ended because gradients were not finite."""
    final: dict[str, float]
    """The last validation, of all that the run measures; empty if there was none."""
    curve: list[tuple[int, float]]
    """Step and cross-entropy of each validation."""


@dataclass(frozen=True)
class Shared:
    """What all runs of a study share."""

    seeds: Sequence[int]
    directory: Path
    text: Sequence[str] = ()
    """Files or globs of other text to pretrain on."""
    pretrained: str = ""
    """Directory of a run to begin with."""


@dataclass(frozen=True)
class Study:
    """A module of this package has one, named STUDY."""

    trials: Callable[[Config], list[Trial]]
    report: Callable[[Sequence[Outcome]], str]
    """Returns the result in Markdown."""
    draw: Callable[[Sequence[Outcome], Any], None]
    """Draws it into a figure of matplotlib's."""
    prepare: Callable[[Config, Shared], Config] | None = None
    """Makes what all runs begin with, and returns the recipe with it."""


def run_study(name: str, base: Config, only: Sequence[str], shared: Shared) -> None:
    """Trains what is not trained yet, and writes results.json, report.md and plot.png into the study's directory.

    What is finished is kept, and a run that was interrupted goes on, so that a study may be stopped at any time.
    Raises ConfigError for a trial that does not exist, and for text or a run to a study that begins with none.
    """
    study: Study = importlib.import_module(STUDIES[name][0]).STUDY
    directory, seeds = shared.directory, shared.seeds
    if shared.text and study.prepare is None:
        raise ConfigError(f"--text = {shared.text[0]!r}: the study {name} reads no other text than its recipe's")
    if shared.pretrained and study.prepare is None:
        raise ConfigError(f"--pretrained = {shared.pretrained!r}: the runs of {name} begin with random values")
    trials = study.trials(base)
    known = [trial.name for trial in trials]
    if unknown := [trial for trial in only if trial not in known]:
        raise ConfigError(f"--only = {unknown[0]!r} is not a trial of {name}, which are {', '.join(known)}")
    if study.prepare is not None:
        trials = study.trials(study.prepare(base, shared))
    chosen = [trial for trial in trials if not only or trial.name in only]
    runs = [(trial, seed) for seed in seeds for trial in chosen]
    for number, (trial, seed) in enumerate(runs, start=1):
        print(f"{name}: {trial.name}, seed {seed} ({number} of {len(runs)})", flush=True)
        _train(trial, seed, directory)
    records = [(trial, record) for trial in trials for record in _records(trial, directory)]
    outcomes = [_outcome(trial, record) for trial, record in records]
    machines = _machines(record for _, record in records)
    result = {"study": name, "machines": machines, "outcomes": list(map(vars, outcomes))}
    write_atomically(directory / "results.json", json.dumps(result, indent=1) + "\n")
    report = study.report(outcomes)
    if machines:
        where = "; ".join(f"{one['device_kind']} (JAX {one['versions']['jax']})" for one in machines)
        report += f"\nTrained on: {where}.\n"
    write_atomically(directory / "report.md", report)
    print(report)
    save_plot(lambda figure: study.draw(outcomes, figure), directory / "plot.png")


def _train(trial: Trial, seed: int, directory: Path) -> None:
    """Trains one run to its end and leaves a record of it; does nothing if there is one."""
    workdir = directory / "runs" / f"{trial.name}-{seed}"
    record = workdir.with_suffix(".json")
    config = trial.seeded(seed)
    if record.exists():
        if json.loads(record.read_text())["config"] == json.loads(to_json(config)):
            return
        raise ConfigError(f"{record} is of another configuration: choose another --workdir, or delete it")
    status = train_run(f"{trial.name}, seed {seed}", config, workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    validations = [record for record in records if record["split"] == "validation"]
    trained, total = _counts(from_json((workdir / "config.json").read_text()))
    outcome = {
        "seed": seed,
        "parameters": total,
        "trained_parameters": trained,
        "diverged": status == DIVERGED,
        "final": {n: v for n, v in validations[-1].items() if isinstance(v, float)} if validations else {},
        "curve": [(record["step"], record["cross_entropy"]) for record in validations],
        "config": json.loads(to_json(config)),
        "machine": machine(),
    }
    write_atomically(record, json.dumps(outcome) + "\n")
    # What the study needs is in the record; the weights of a hundred runs would fill a disk.
    shutil.rmtree(workdir)
    print(f"recorded in {record}", flush=True)


def train_run(name: str, config: Config, workdir: Path) -> int:
    """Trains a run, or goes on with it, and returns 0, or DIVERGED. Raises ConfigError where it could not be trained."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.json"
        recipe.write_text(to_json(config))
        # A process of its own, so that a run that takes all memory does not take the study with it.
        arguments = ["train", "--config", str(recipe), "--workdir", str(workdir)]
        status = _run(*own_process("from transformer.cli import main; main()", arguments))
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        # It saved its state, and goes on when the study does.
        raise SystemExit(status)
    if status not in (0, DIVERGED):
        raise ConfigError(f"{name}: training ended with status {status}; what it saved is in {workdir}")
    return status


def _run(command: Sequence[str], environment: dict[str, str]) -> int:
    """Runs a command and returns its status; a signal to this process is the command's, which saves its state first."""
    # In a session of its own, or Ctrl-C would reach it twice, and the second would not let it save.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    before = {
        number: signal.signal(number, lambda received, _: process.send_signal(received))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _counts(config: Config) -> tuple[int, int]:
    """Returns how many parameters a run has trained, and how many its model has."""
    import jax

    from transformer.checkpointing.run import make_model
    from transformer.models import adapters
    from transformer.models.parameters import parameter_specs
    from transformer.optimizers import trained_part

    model = make_model(config, jax.default_backend())
    return adapters.counts(model, trained_part(config, parameter_specs(model)))


def _records(trial: Trial, directory: Path) -> list[dict[str, Any]]:
    """Returns what is recorded of a trial, by seed."""
    found = [json.loads(path.read_text()) for path in (directory / "runs").glob(f"{trial.name}-*.json")]
    # Others are of an older study with other settings, or of a trial whose name begins alike.
    mine = [r for r in found if r["config"] == json.loads(to_json(trial.seeded(r["seed"])))]
    return sorted(mine, key=lambda record: record["seed"])


def _outcome(trial: Trial, record: Mapping[str, Any]) -> Outcome:
    return Outcome(
        trial.name,
        record["seed"],
        trial.facts,
        record["parameters"],
        record["trained_parameters"],
        record["diverged"],
        record["final"],
        [(step, loss) for step, loss in record["curve"]],
    )


def _machines(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the machines that runs were made on, each once."""
    found: list[dict[str, Any]] = []
    for record in records:
        if record["machine"] not in found:
            found.append(record["machine"])
    return found


def by_trial(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """Returns the outcomes of each trial, in the order of the trials."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.name, []).append(outcome)
    return groups


def last(group: Sequence[Outcome], name: str) -> list[float]:
    """Returns what the last validation of each run measured, of those that did not diverge."""
    return [outcome.final[name] for outcome in group if outcome.final and not outcome.diverged]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Returns the mean and the standard deviation of the sample: `1.234 ± 0.005`; of one value there is no deviation."""
    if not values:
        return "–"
    if not all(map(math.isfinite, values)):
        return "not finite"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean

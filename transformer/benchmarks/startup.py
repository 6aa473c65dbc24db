"""`transformer benchmark startup`: what passes between the start of a process and its first step."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.arguments import Overrides, Recipe, TrainOptions, exit_status, parse
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, own_process, tell, too_small
from transformer.config import Config, ConfigError, replace, to_json

PHASES = ("command line", "JAX", "other imports", "data", "state", "compilation", "first step")
"""In the order in which they pass; what lies between two is counted with the later."""


@dataclass(frozen=True)
class Options:
    """Start a run of a recipe again and again up to its first step: once with empty caches, then with what that left.

    The first start prepares the data and compiles; caches and runs are in a directory of their own and are deleted.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    rounds: int = 5
    """Warm starts."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problems := too_small(options, {"rounds": 1}):
        raise ConfigError(problems)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        config = replace(
            options.config,
            data={"cache_dir": str(place / "data")},
            train={"num_steps": 1},
            optimizer={"warmup_steps": 0, "warmup_tokens": 0},
            evaluation={"every_steps": 0},
            checkpoint={"every_steps": 0},
            compilation_cache_dir=str(place / "programs"),
        )
        starts = []
        for number in range(1 + options.rounds):
            tell(f"start {number + 1} of {1 + options.rounds}, {'warm' if number else 'cold'}")
            starts.append(first_step(config, place / f"run-{number}"))
    cold, *warm = starts
    measurements = {"cold": Measurement((sum(cold.values()),), "s")}
    measurements["warm"] = Measurement(tuple(sum(phases.values()) for phases in warm), "s")
    for name in PHASES:
        measurements[f"cold: {name}"] = Measurement((cold[name],), "s")
        measurements[f"warm: {name}"] = Measurement(tuple(phases[name] for phases in warm), "s")
    result = Result("startup", {"config": json.loads(to_json(options.config))["model"]}, machine(), measurements, {})
    print(text_of(result))
    if options.json_file:
        result.write(options.json_file)
    return 0


def first_step(config: Config, workdir: Path) -> dict[str, float]:
    """Starts a process that trains for one step and returns the seconds of each phase."""
    recipe, found = workdir.with_suffix(".config.json"), workdir.with_suffix(".phases.json")
    recipe.write_text(to_json(config))
    arguments = [repr(time.time()), str(found), "--config", str(recipe), "--workdir", str(workdir)]
    command, environment = own_process("from transformer.benchmarks.startup import child; child()", arguments)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        told = "\n".join(errors) or done.stderr.strip() or done.stdout.strip()
        raise ConfigError(f"the run ended with status {done.returncode}: {told}")
    return json.loads(found.read_text())


def child() -> None:
    """The process that is timed: it trains as `transformer train` does, and writes down when each phase was over."""
    began, found, *arguments = sys.argv[1:]
    ends: dict[str, float] = {}

    def over(phase: str) -> None:
        ends.setdefault(phase, time.time())

    def watched(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            value = function(*args, **options)
            over(phase)
            return value

        return call

    from transformer.parallel import startup

    options = parse(TrainOptions, arguments, "transformer train")
    over("command line")
    startup.start(options.config)

    import jax

    jax.devices()
    over("JAX")
    from transformer.training import loop

    over("other imports")
    loop.prepare_apart = watched("data", loop.prepare_apart)
    loop.create_state = watched("state", lambda *state, create=loop.create_state: jax.block_until_ready(create(*state)))
    loop.Loop._compile = watched("compilation", loop.Loop._compile)

    def settle(self: Any, pending: Any, original: Any = loop.Loop._settle) -> int:
        status = original(self, pending)
        if pending is not None:
            over("first step")
        return status

    loop.Loop._settle = settle
    if status := exit_status(lambda _: loop.run(options.config, Path(options.workdir)), []):
        sys.exit(status)
    times = [float(began), *(ends[phase] for phase in PHASES)]
    phases = {phase: after - before for phase, before, after in zip(PHASES, times, times[1:], strict=False)}
    Path(found).write_text(json.dumps(phases))


def text_of(result: Result) -> str:
    """Returns the phases as a table to read."""
    found = result.measurements
    rows = [f"{'':<16}{'cold':>10}{'warm':>10}   seconds; warm is the median of {len(found['warm'].values)}"]
    rows += [
        f"{name:<16}{found[f'cold: {name}'].median:>10.2f}{found[f'warm: {name}'].median:>10.2f}" for name in PHASES
    ]
    rows.append(f"{'to first step':<16}{found['cold'].median:>10.2f}{found['warm'].median:>10.2f}")
    return "\n".join(rows)

"""`transformer plan`."""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, asked, machine, own_process
from transformer.config import (
    MESH_AXES,
    Config,
    ConfigError,
    mesh_problems,
    nearest,
    replace,
    to_json,
    write_atomically,
)
from transformer.plans.chips import Topology, parse_topology


@dataclass(frozen=True)
class PlanOptions:
    """Compile the training step for a pod that is not here, and tell whether it fits, what it sends where, and how long it
    takes.

    The compiler is libtpu's; no TPU is needed. The step is the one that `train` runs, with its mesh and its flags. What is
    predicted is predicted by a model that is printed with it.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    topology: str = ""
    """Chip and shape of a slice, such as v5p:8x8x8 or v6e:16x16."""
    slices: int = 1
    """Slices of that shape, joined by the data-centre network; parallel.replica is a multiple of them."""
    periods: tuple[int, ...] = ()
    """Two depths, in periods of the pattern of layers, to compile instead of the whole and go on from in a straight line."""
    arithmetic: bool = False
    """Compile nothing: what arithmetic alone says, in a second, also of chips that there is no compiler for."""
    search: bool = False
    """Look for the best split, microbatches and remat, and say why the others lost."""
    axes: tuple[str, ...] = MESH_AXES
    """Axes of the mesh that a search splits over."""
    candidates: int = 5
    """Settings that a search compiles, one after another, each the one that is now expected to be the fastest."""
    compare: tuple[str, ...] = ()
    """Others to set beside it: a topology, a split, or both, such as v6e:16x16,slices=2 or fsdp=64,tensor=4."""
    tokens: float = 0.0
    """Tokens to be trained on, to tell days and chip-hours for."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: PlanOptions) -> int:
    if not options.topology:
        raise ConfigError("--topology is missing: name chip and shape, such as v5p:8x8x8")
    topology = parse_topology(options.topology, options.slices)
    if options.periods and (len(options.periods) != 2 or not 0 < options.periods[0] < options.periods[1]):
        raise ConfigError(f"--periods = {options.periods}: must be two numbers, the smaller first")
    if options.candidates < 1 or options.tokens < 0:
        raise ConfigError("--candidates must be at least 1, --tokens not negative")
    for axis in options.axes:
        if axis not in MESH_AXES:
            raise ConfigError(f"--axes {axis}: axes are {', '.join(MESH_AXES)}{nearest(axis, MESH_AXES)}")
    if options.search and topology.num_slices > 1 and "replica" not in options.axes:
        raise ConfigError(f"--axes: must have replica, which {topology.num_slices} slices need")
    config = on_slices(options.config, topology)
    if options.compare:
        return _compare(options, config)
    if options.arithmetic:
        if options.search or options.json_file:
            raise ConfigError("--arithmetic prints one estimate: leave out --search and --json")
        return _estimate(config, topology, options.tokens)
    from transformer.plans.compilation import prepare

    if not options.search and (problems := mesh_problems(config, topology.num_chips)):
        raise ConfigError(problems)
    prepare(topology.chip, config)
    from transformer.plans import report

    if options.search:
        from transformer.plans.search import search

        def tell(text: str) -> None:
            print(text, file=sys.stderr, flush=True)

        found = search(known_vocabulary(config), topology, options.candidates, options.axes, tell=tell)
        print(report.search_text(found, topology))
        record = {"settings": [report.record_of(item.compiled) for item in found.ranked if item.compiled]}
        if not found.ranked:
            raise ConfigError(f"no setting of this configuration fits on {topology}")
    else:
        compiled = _compiled(config, topology, options.periods)
        print(report.text_of(compiled, options.tokens))
        record = report.record_of(compiled, options.tokens)
    _write(options, record)
    return 0


def _write(options: PlanOptions, record: dict[str, Any]) -> None:
    if options.json_file:
        record = asked() | {"machine": machine()} | record
        write_atomically(Path(options.json_file).expanduser(), json.dumps(record, indent=1) + "\n")


def _estimate(config: Config, topology: Topology, tokens: float) -> int:
    if problems := mesh_problems(config, topology.num_chips):
        raise ConfigError(problems)
    from transformer.plans import report
    from transformer.plans.arithmetic import estimate

    print(report.estimate_text(estimate(known_vocabulary(config), topology), tokens))
    return 0


def on_slices(config: Config, topology: Topology) -> Config:
    """Returns `config` with a replica for each slice, where it does not say how many."""
    if topology.num_slices > 1 and config.parallel.replica == 1:
        return replace(config, parallel={"replica": topology.num_slices})
    return config


def known_vocabulary(config: Config) -> Config:
    """Returns `config` with the size of its vocabulary, which arithmetic needs."""
    from transformer.objectives import objective_of, vocabulary

    size = vocabulary.without_data(config) + objective_of(config).num_extra_tokens(config)
    return replace(config, model={"vocab_size": config.model.vocab_size or size})


def _compiled(config: Config, topology: Topology, periods: tuple[int, ...]) -> Any:
    from transformer.plans.compilation import compile_for, extrapolated

    if not periods:
        return compile_for(config, topology)
    total = config.model.num_periods
    if periods[1] > total:
        raise ConfigError(f"--periods = {periods}: the model has {total} of layers")
    few, more = (compile_for(config, topology, count) for count in periods)
    if not (few.fits and more.fits):
        return few if not few.fits else more
    return extrapolated(few, more, (periods[0], periods[1]), config)


def _compare(options: PlanOptions, config: Config) -> int:
    """Makes each plan in a process of its own: what the compiler is told differs from chip to chip."""
    from transformer.plans.report import compared, split_config

    columns = [(options.config, options.topology, options.slices)]
    for text in options.compare:
        changed, found = split_config(options.config, text)
        columns.append((changed, found.get("topology", options.topology), int(found.get("slices", options.slices))))
    records = []
    for changed, name, slices in columns:
        topology = parse_topology(name, slices)
        changed = on_slices(changed, topology)
        if problems := mesh_problems(changed, topology.num_chips):
            raise ConfigError([f"{topology}: {problem}" for problem in problems])
    with tempfile.TemporaryDirectory() as directory:
        source, result = Path(directory) / "config.json", Path(directory) / "plan.json"
        for changed, name, slices in columns:
            write_atomically(source, to_json(changed))
            flags = ["--config", str(source), "--topology", name, "--slices", str(slices), "--json", str(result)]
            flags += ["--periods", *map(str, options.periods)] if options.periods else []
            flags += ["--tokens", str(options.tokens)] if options.tokens else []
            command, environment = own_process("from transformer.cli import main; main()", ["plan", *flags])
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise ConfigError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))
            records.append(json.loads(result.read_text()))
    print(compared(records))
    _write(options, {"plans": records})
    return 0

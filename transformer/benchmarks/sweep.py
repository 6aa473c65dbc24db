"""`transformer benchmark sweep`: the fastest way to train a model in the memory that there is."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, timed, too_small
from transformer.config import Config, ConfigError, get, problems_of, replace, to_json, type_of, write_atomically


@dataclass(frozen=True)
class Options:
    """Compile the step of a recipe in many settings, time those that fit into the memory, and name the fastest.

    What does not fit is known once it is compiled, and is never run; nor is a larger batch compiled when a smaller one did
    not fit. The learning rate that suits another batch is not looked for.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    batch_sizes: tuple[int, ...] = ()
    """Sequences in a batch; none: the recipe's, half and twice it."""
    remat: tuple[str, ...] = ("none", "dots", "full")
    """What to compute again for the gradient."""
    attention: tuple[str, ...] = ("auto",)
    """Implementations of attention."""
    scan: tuple[bool, ...] = (True, False)
    """Layers in a loop, or unrolled."""
    memory: float = 0.0
    """GiB of memory on each device; 0: what the device says it has."""
    rounds: int = 5
    """Steps that are timed in each setting."""
    output: str = ""
    """File for the configuration in the fastest setting, which --config reads."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


KEYS = ("train.batch_size", "model.remat", "model.attention_implementation", "model.scan_layers")
"""What a setting sets."""


def run(options: Options) -> int:
    settings = list(_settings(options))
    from transformer.parallel import startup

    startup.start(options.config)
    from transformer.benchmarks.program import make_program

    limit = options.memory * 2**30 or _device_memory()
    if limit is None:
        raise ConfigError("--memory is needed: this device does not say how much it has")
    measurements: dict[str, Measurement] = {}
    needs: dict[str, int] = {}
    smallest_too_large: dict[tuple[Any, ...], int] = {}
    for config in settings:
        size, *others = (get(config, key) for key in KEYS)
        label = flags_of(config)
        if size >= smallest_too_large.get(tuple(others), size + 1):
            print(f"{label}: not compiled, for a smaller batch does not fit", flush=True)
            continue
        program = make_program(config)
        needs[label] = program.memory["peak"]
        told = f"{label}: {needs[label] / 2**20:,.0f} MiB"
        if needs[label] > limit:
            smallest_too_large[tuple(others)] = size
            print(f"{told}, does not fit", flush=True)
            continue
        seconds = timed({"step": program}, options.rounds, warmup=2)["step"]
        measurements[label] = Measurement(tuple(program.num_tokens / s for s in seconds), "tokens/s")
        print(f"{told}, {measurements[label]}", flush=True)
        program.state = None
    if not measurements:
        least = min(needs.values()) / 2**30
        raise ConfigError(
            f"no setting fits into {limit / 2**30:.3g} GiB: the smallest needs {least:.3g} GiB on each device"
        )
    best = max(measurements, key=lambda label: measurements[label].median)
    print(f"fastest: {best}")
    if options.output:
        chosen = next(config for config in settings if flags_of(config) == best)
        write_atomically(Path(options.output).expanduser(), to_json(chosen))
    if options.json_file:
        subject = {"settings": [flags_of(config) for config in settings], "memory_bytes": limit}
        Result("sweep", subject, machine(), measurements, {"bytes": needs, "best": best}).write(options.json_file)
    return 0


def _settings(options: Options) -> Iterator[Config]:
    """Yields the configurations to try, smaller batches first. Raises ConfigError with everything wrong with any."""
    size = options.config.train.batch_size
    sizes = sorted(set(options.batch_sizes or (max(1, size // 2), size, 2 * size)))
    least = {"rounds": 1, "memory": 0} | ({"batch_sizes": 1} if options.batch_sizes else {})
    problems: dict[str, None] = dict.fromkeys(too_small(options, least))
    for name, key in (("remat", "model.remat"), ("attention", "model.attention_implementation")):
        known = get_args(type_of(key))
        for value in getattr(options, name):
            if value not in known:
                problems[f"--{name} = {value!r}: must be one of {', '.join(known)}"] = None
    if not (options.remat and options.attention and options.scan):
        problems["--remat, --attention and --scan need a value each"] = None
    if problems:
        raise ConfigError(list(problems))
    for size, remat, attention, scan in itertools.product(sizes, options.remat, options.attention, options.scan):
        model = {"remat": remat, "attention_implementation": attention, "scan_layers": scan}
        config = replace(options.config, train={"batch_size": size}, model=model)
        problems |= dict.fromkeys(problems_of(config))
        if not problems:
            yield config
    if problems:
        raise ConfigError(list(problems))


def flags_of(config: Config) -> str:
    """Returns the setting as it is given to `train`."""
    return " ".join(f"--{key.replace('_', '-')} {get(config, key)}" for key in KEYS)


def _device_memory() -> int | None:
    """Returns the bytes of a device's memory, None where it does not tell."""
    import jax

    found = jax.devices()[0].memory_stats()
    return None if not found else found.get("bytes_limit")

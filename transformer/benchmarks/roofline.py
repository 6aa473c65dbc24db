"""`transformer benchmark roofline`: the ceilings of this machine, and where a step lies below them.

Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model for multicore architectures": a
program does no more FLOP/s than the machine's peak, nor than its bandwidth times the FLOPs for each byte that is moved.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, tell, timed, too_small
from transformer.config import Config, ConfigError, replace

SIZES = {"cpu": (256, 512, 1024, 2048), "other": (2048, 4096, 8192, 16384)}
"""Square matrices whose product is timed."""
BYTES = {"cpu": 2**28, "other": 2**31}
"""Bytes of an array that is read and written: more than caches hold."""


@dataclass(frozen=True)
class Options:
    """Measure how fast this machine multiplies matrices and moves memory, and how much of it the step of a recipe reaches.

    All is of one device, also where a mesh of several takes the step.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    rounds: int = 10
    """Times that each is timed."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problems := too_small(options, {"rounds": 1}):
        raise ConfigError(problems)
    from transformer.parallel import startup

    startup.start(options.config)
    from transformer.benchmarks.program import make_program

    # XLA counts the body of a loop once, however often it runs.
    program = make_program(replace(options.config, model={"scan_layers": False}))
    calls, work = ceilings(program.config.model.compute_dtype)
    tell(f"timing {options.rounds} rounds of {len(calls)} products and the step")
    seconds = timed({**calls, "step": program}, options.rounds, warmup=2)
    moved = float(program.compiled.cost_analysis()["bytes accessed"])
    flops = program.flops(True) / program.mesh.size
    products = {name: work[name] / statistics.median(seconds[name]) for name in calls if name != "memory"}
    fastest = max(products, key=lambda name: products[name])
    measurements = {
        "products": Measurement(tuple(work[fastest] / s for s in seconds[fastest]), "FLOP/s"),
        "memory": Measurement(tuple(work["memory"] / s for s in seconds["memory"]), "bytes/s"),
        "step_flops_per_second": Measurement(tuple(flops / s for s in seconds["step"]), "FLOP/s"),
    }
    facts = {"fastest_product": fastest, "products": products, "step_flops": flops, "step_bytes": moved}
    subject = {"compute_dtype": program.config.model.compute_dtype, "step_flops": flops}
    result = Result("roofline", subject, machine(), measurements, facts)
    print(text_of(result))
    if options.json_file:
        result.write(options.json_file)
    return 0


def ceilings(dtype: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """Returns what to time, on one device: products by size, and a pass over memory; and the FLOPs or bytes of each."""
    import jax
    import jax.numpy as jnp

    kind = "cpu" if jax.default_backend() == "cpu" else "other"
    calls: dict[str, Callable[[], Any]] = {}
    work: dict[str, float] = {}
    multiply = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32).astype(x.dtype))
    for size in SIZES[kind]:
        x = jnp.full((size, size), 1 / size, dtype)
        calls[f"product of {size}"] = lambda x=x: multiply(x)
        work[f"product of {size}"] = 2.0 * size**3
    array = jnp.ones(BYTES[kind] // 4, jnp.float32)
    scale = jax.jit(lambda x: 2 * x)
    calls["memory"] = lambda: scale(array)
    work["memory"] = 2.0 * BYTES[kind]
    return calls, work


def text_of(result: Result) -> str:
    """Returns the result as lines to read."""
    facts, found = result.facts, result.measurements
    peak, bandwidth = found["products"].median, found["memory"].median
    intensity, reached = facts["step_flops"] / facts["step_bytes"], found["step_flops_per_second"].median
    ceiling = min(peak, bandwidth * intensity)
    bound = "products" if peak <= bandwidth * intensity else "memory"
    return "\n".join(
        [
            f"{result.machine['num_devices']} x {result.machine['device_kind']} ({result.machine['processor']})",
            f"products of matrices, {result.subject['compute_dtype']}: {found['products']}, {facts['fastest_product']}",
            f"memory, read and written: {found['memory']}",
            f"the ridge is at {peak / bandwidth:.3g} FLOPs a byte",
            f"the step: {found['step_flops_per_second']}, {intensity:.3g} FLOPs for each byte that its operations touch",
            f"its ceiling is that of {bound}, {ceiling:.4g} FLOP/s, of which it reaches {reached / ceiling:.0%}; of the "
            f"products' {reached / peak:.0%}",
        ]
    )

"""`transformer benchmark step`: how fast the training step of a recipe is here, and what it needs."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import (
    JsonFile,
    Measurement,
    Result,
    machine,
    peak_resident_bytes,
    tell,
    timed,
    too_small,
)
from transformer.config import Config, ConfigError

if TYPE_CHECKING:
    from transformer.benchmarks.program import Program

FORMULA = "3 times the products of the forward pass (Chowdhery et al. 2022, arXiv:2204.02311, appendix B)"
TRACED_STEPS = 3
SLOWEST = 15


@dataclass(frozen=True)
class Options:
    """Time the training step of a recipe, on tokens that are made up: it needs no data.

    The model, its mesh and all else are those of `train` with the same options.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    rounds: int = 20
    """Steps that are timed, one by one."""
    warmup: int = 3
    """Steps before those."""
    profile: str = ""
    """Directory for a trace of a few more steps, which TensorBoard and Perfetto open; the slowest operations are printed."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    least = {"rounds": 1, "warmup": 0}
    if problems := too_small(options, least):
        raise ConfigError(problems)
    if options.profile:
        try:
            Path(options.profile).expanduser().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--profile = {options.profile!r}: {error.strerror}") from error
    from transformer.parallel import startup

    startup.start(options.config)
    from transformer.benchmarks.program import make_program

    tell("compiling the step")
    program = make_program(options.config)
    program.start()
    tell(f"timing {options.rounds} steps after {options.warmup} to warm up")
    losses: list[Any] = []

    def step() -> Any:
        metrics = program()
        losses.append(metrics["loss"])
        return metrics

    seconds = timed({"step": step}, options.rounds, options.warmup)["step"]
    result = result_of(program, seconds)
    result.facts["losses"] = list(map(float, losses))
    print(text_of(result))
    if options.json_file:
        result.write(options.json_file)
    if options.profile:
        print(slowest(program, Path(options.profile).expanduser()))
    return 0


def result_of(program: "Program", seconds: list[float]) -> Result:
    """Returns what the times of a program's step say of it."""
    config, model = program.config, program.config.model
    subject = {
        "parameters": program.num_parameters,
        "tokens": program.num_tokens,
        "sequence_length": config.data.sequence_length,
        "vocab_size": model.vocab_size,
        "compute_dtype": model.compute_dtype,
    }
    facts: dict[str, Any] = {
        "model_flops_attention_in_full": program.flops(False),
        "model_flops_attention_causal_half": program.flops(True),
        "flop_formula": FORMULA,
        "compile_seconds": program.compile_seconds,
        "bytes_per_device": program.memory,
        "mesh": dict(program.mesh.shape),
    }
    measurements = {
        "step_seconds": Measurement(tuple(seconds), "s"),
        "tokens_per_second": Measurement(tuple(program.num_tokens / s for s in seconds), "tokens/s"),
        "flops_per_second": Measurement(tuple(program.flops(True) / s for s in seconds), "FLOP/s"),
    }
    if (peak := program.peak_flops) is not None:
        for name, causal in (("mfu_attention_in_full", False), ("mfu_attention_causal_half", True)):
            measurements[name] = Measurement(tuple(program.flops(causal) / s / peak for s in seconds), "of peak")
        again = program.recomputed_flops
        facts["hardware_flops"] = program.flops(True) + again
        measurements["hfu"] = Measurement(tuple((program.flops(True) + again) / s / peak for s in seconds), "of peak")
    if (resident := peak_resident_bytes()) is not None and program.mesh.devices.flat[0].platform == "cpu":
        facts["peak_resident_bytes"] = resident
    return Result("step", subject, machine(), measurements, facts)


def text_of(result: Result) -> str:
    """Returns the result as lines to read."""
    facts, subject = result.facts, result.subject
    where = result.machine
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in facts["bytes_per_device"].items())
    lines = [
        f"{subject['parameters']:,} parameters, {subject['tokens']:,} tokens a step, {subject['compute_dtype']}",
        f"{where['num_devices']} x {where['device_kind']} ({where['processor']}), JAX {where['versions'].get('jax')}",
        f"compiled in {facts['compile_seconds']:.1f} s; bytes on each device: {memory}",
    ]
    if "peak_resident_bytes" in facts:
        lines.append(f"peak resident memory of the process: {facts['peak_resident_bytes'] / 2**20:,.0f} MiB")
    lines += [f"{name.replace('_', ' ')}: {measured}" for name, measured in result.measurements.items()]
    if losses := facts.get("losses"):
        lines.append(
            f"loss of the first step {losses[0]:.6f}, of the last {losses[-1]:.6f}, on one batch of made-up tokens"
        )
    full, half = facts["model_flops_attention_in_full"], facts["model_flops_attention_causal_half"]
    lines.append(f"model FLOPs a step: {half:.4g} with the causal half of attention, {full:.4g} with all of it")
    if not any(name.startswith("mfu") for name in result.measurements):
        lines.append(f"no MFU: the peak of {where['device_kind']!r} is not known (`benchmark roofline` measures one)")
    return "\n".join(lines)


def slowest(program: "Program", directory: Path) -> str:
    """Traces a few steps into `directory` and returns a table of the operations that took longest, per step and
    summed over devices."""
    import jax
    from jax.profiler import ProfileData

    with jax.profiler.trace(str(directory)):
        for number in range(TRACED_STEPS):
            with jax.profiler.StepTraceAnnotation("train", step_num=number):
                jax.block_until_ready(program())
    newest = max(directory.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    names, total, count = _names_of(program.compiled.as_text()), Counter(), Counter()
    for plane in ProfileData.from_file(str(newest)).planes:
        for line in plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    total[str(operation)] += event.duration_ns
                    count[str(operation)] += 1
    rows = [f"{'ms a step':>10}{'times':>7}  operation"]
    for operation, nanoseconds in total.most_common(SLOWEST):
        times = count[operation] / TRACED_STEPS
        rows.append(f"{nanoseconds / TRACED_STEPS / 1e6:>10.2f}{times:>7.0f}  {operation}  {names.get(operation, '')}")
    return f"the slowest operations, of {TRACED_STEPS} steps traced into {directory}:\n" + "\n".join(rows)


def _names_of(hlo: str) -> dict[str, str]:
    """Returns for each operation of a compiled program the part of the model that it comes from."""
    found = re.findall(r'%?([\w.\-]+) = [^\n]*?metadata=\{[^}\n]*?op_name="([^"\n]*)"', hlo)
    return {operation: name.partition("/")[2] for operation, name in found}

"""`transformer benchmark input`: how fast batches come, against how fast the step of the same recipe takes them."""

import time
from dataclasses import dataclass, field

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, resident_bytes, timed, too_small
from transformer.config import Config, ConfigError, replace

READINGS = 20
"""Parts of an epoch, each of which is timed."""


@dataclass(frozen=True)
class Options:
    """Read an epoch of batches as training does, packing, masking and all, and time the step that would take them.

    The data is prepared first, as `prepare` does; nothing is trained.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    rounds: int = 5
    """Steps that are timed."""
    batches: int = 0
    """Batches to read; 0: an epoch."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problems := too_small(options, {"rounds": 1, "batches": 0}):
        raise ConfigError(problems)
    from transformer.parallel import startup

    startup.start(options.config)

    import numpy as np

    from transformer.benchmarks.program import make_program
    from transformer.checkpointing.run import resolve
    from transformer.data.batches import train_batches
    from transformer.data.prepared import prepare_apart
    from transformer.objectives import objective_of, with_examples, with_window
    from transformer.parallel.sharding import local_rows, make_mesh

    mesh = make_mesh(options.config)
    prepared = prepare_apart(with_window(options.config))
    config = resolve(options.config, prepared.tokenizer.vocab_size, prepared.num_labels)
    epoch = sum(source.train.num_windows for source in prepared.sources) // config.train.batch_size
    count = max(READINGS, options.batches or epoch)
    config = replace(config, train={"num_steps": count})
    program = make_program(config)
    steps = timed({"step": program}, options.rounds, warmup=2)["step"]

    prepared = with_examples(prepared, objective_of(config), config)
    rows = local_rows(mesh, config.train.batch_size)
    ends = np.linspace(0, count, READINGS + 1).astype(int)[1:]
    rates, memory, tokens, start, number = [], [], 0, time.perf_counter(), 0
    for number, batch in enumerate(train_batches(config, prepared, 0, rows), start=1):
        tokens += int(np.sum(batch["segment_ids"] > 0))
        if number in ends:
            now = time.perf_counter()
            rates.append(tokens / (now - start))
            memory.append(float(resident_bytes() or 0))
            tokens, start = 0, now
    share = len(rows) / config.train.batch_size  # of the batch that this process reads
    measurements = {
        "tokens_per_second": Measurement(tuple(rates), "tokens/s"),
        "step_tokens_per_second": Measurement(tuple(share * program.num_tokens / s for s in steps), "tokens/s"),
    }
    if all(memory):
        measurements["resident_bytes"] = Measurement(tuple(memory), "bytes")
    facts = {"batches": number, "batches_of_an_epoch": epoch, "num_workers": config.data.num_workers}
    subject = {"tokens": program.num_tokens, "objective": config.objective.name, "parameters": program.num_parameters}
    result = Result("input", subject, machine(), measurements, facts)
    print(text_of(result))
    if options.json_file:
        result.write(options.json_file)
    return 0


def text_of(result: Result) -> str:
    """Returns the result as lines to read."""
    found, facts = result.measurements, result.facts
    ratio = found["tokens_per_second"].median / found["step_tokens_per_second"].median
    epochs = facts["batches"] / max(1, facts["batches_of_an_epoch"])
    lines = [
        f"{facts['batches']:,} batches ({epochs:.2g} epochs): {found['tokens_per_second']}",
        f"the step takes {found['step_tokens_per_second']}: batches come {ratio:.1f} times as fast",
    ]
    if "resident_bytes" in found:
        held = [size / 2**20 for size in found["resident_bytes"].values]
        lines.append(
            f"resident memory, MiB: {held[0]:,.0f} at a {READINGS}th, {max(held):,.0f} at most, {held[-1]:,.0f} at the end"
        )
    return "\n".join(lines)

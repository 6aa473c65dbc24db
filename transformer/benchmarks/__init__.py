"""Benchmarks: what a machine and a configuration can do, measured so that it can be repeated and compared."""

BENCHMARKS: dict[str, tuple[str, str]] = {
    "step": ("transformer.benchmarks.step", "the training step of a recipe: tokens a second, MFU, memory, compilation"),
    "roofline": ("transformer.benchmarks.roofline", "the ceilings of this machine, and where the step lies below them"),
    "startup": (
        "transformer.benchmarks.startup",
        "from the start of a process to its first step, by phase, cold and warm",
    ),
    "kernels": (
        "transformer.benchmarks.kernels",
        "implementations of attention, and mixers, by the length of the text",
    ),
    "input": ("transformer.benchmarks.input", "the pipeline of batches alone, against what the step takes"),
    "sweep": ("transformer.benchmarks.sweep", "the fastest setting of a recipe that fits into the memory"),
    "decode": ("transformer.benchmarks.decode", "time to the first token and to each further one, by batch and prompt"),
    "rnn": ("transformer.benchmarks.rnn", "recurrent networks against attention, by the length of the text"),
    "compare": ("transformer.benchmarks.compare", "two results, as ratios with their spread"),
}
"""Module by name, and what it measures; a module has the dataclass Options, and `run` from it to an exit status."""

"""Trains a Transformer: the place to begin reading.

    python train.py --config configs/stdlib.py --workdir runs/stdlib --optimizer.learning-rate 3e-4

The same command again goes on where the run stopped; `python train.py --help` shows every key.
"""

import sys
from collections.abc import Sequence

from transformer.arguments import TrainOptions, exit_status, parse
from transformer.config import place
from transformer.parallel import startup


def main(arguments: Sequence[str]) -> int:
    # The configuration: defaults (transformer/config/), then the recipe, then the flags. Whatever is wrong with it
    # is told here, all at once, before anything is compiled or written.
    options = parse(TrainOptions, arguments, "train.py")

    # Devices, processes, memory allocator and compilation cache are settled before JAX is imported.
    startup.start(options.config)

    # The run: prepare the data unless that is done, lay model and optimizer out over the mesh, restore the last
    # checkpoint if there is one, then step, validate, sample and save until the last step or a signal.
    from transformer.training.loop import run

    return run(options.config, place(options.workdir))


if __name__ == "__main__":
    sys.exit(exit_status(main, sys.argv[1:]))

"""The loss of a model that knows nothing but how often each token occurs: what any other has to be below.

    python benchmarks/frequencies.py stdlib

Counts the tokens of a recipe's training split, each once more than it occurs, and prints the cross-entropy of the validation
batches that `train.py` would measure.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.arguments import load_config
from transformer.data.batches import validation_batches
from transformer.data.prepared import prepare_apart
from transformer.objectives import with_window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    config = with_window(load_config(parser.parse_args().recipe)[0])
    prepared = prepare_apart(config)
    size = prepared.tokenizer.vocab_size
    counts = np.ones(size, np.int64)
    for split in (source.train for source in prepared.sources):
        for number in range(split.num_windows):
            counts += np.bincount(split.window(number)["targets"], minlength=size)
    logs = -np.log(counts / counts.sum())
    total, weight = 0.0, 0.0
    for batch in validation_batches(config, prepared, range(config.train.batch_size)):
        total += float(np.sum(batch["weights"] * logs[batch["targets"]]))
        weight += float(np.sum(batch["weights"]))
    print(f"{total / weight:.4f} nats a token over {weight:,.0f} tokens")


if __name__ == "__main__":
    main()

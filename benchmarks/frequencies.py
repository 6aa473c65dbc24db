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
from transformer.data.shards import reader
from transformer.data.writing import token_type
from transformer.objectives import with_window


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    config = with_window(load_config(parser.parse_args().recipe)[0])
    prepared = prepare_apart(config)
    size = prepared.tokenizer.vocab_size
    counts = np.ones(size, np.int64)
    for shard in sorted(prepared.sources[0].train.directory.glob("train-*.array_record")):
        # The last record describes the shard; the others begin with where documents start in them.
        for record in reader(str(shard)).read_all()[:-1]:
            starts = int(np.frombuffer(record, np.uint32, 1)[0])
            tokens = np.frombuffer(record, token_type(size), offset=4 * (1 + starts))
            counts += np.bincount(tokens, minlength=size)
    logs = -np.log(counts / counts.sum())
    total, weight = 0.0, 0.0
    for batch in validation_batches(config, prepared, range(config.train.batch_size)):
        total += float(np.sum(batch["weights"] * logs[batch["targets"]]))
        weight += float(np.sum(batch["weights"]))
    print(f"{total / weight:.4f} nats a token over {weight:,.0f} tokens")


if __name__ == "__main__":
    main()

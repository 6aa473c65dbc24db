"""Associative recall with many queries: a made-up task that asks for exact memory (Arora et al. 2023, arXiv:2312.04927)."""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import NUM_SPECIAL, Tokenizer
from transformer.objectives.cross_entropy import TokenObjective


class AssociativeRecall(TokenObjective):
    """The value of each key, all of which were told before: k1 v1 k2 v2 ..., then the keys again in another order.

    The text gives nothing but the number of the example. Keys are the lower half of the tokenizer's tokens and occur once
    in an example, values are the upper half, drawn with replacement. Only a token that asks has weight, so that `accuracy`
    is the share of values that the model recalls.
    """

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns up to `num_pairs` pairs of key and value, each number as often, and as many questions.

        From examples of few pairs, where little has to be told apart, a model learns to look at all.
        """
        middle = (NUM_SPECIAL + tokenizer.vocab_size) // 2
        pairs = int(rng.integers(1, config.objective.num_pairs + 1))
        keys = rng.permutation(np.arange(NUM_SPECIAL, middle))[:pairs]
        values = rng.integers(middle, tokenizer.vocab_size, pairs)
        asked = rng.permutation(pairs)
        told = np.stack([keys, values], axis=1).reshape(-1)
        inputs = np.concatenate([told, keys[asked]])
        targets = np.concatenate([np.zeros_like(told), values[asked]])
        asks = np.arange(len(inputs)) >= len(told)
        return {
            "inputs": inputs,
            "targets": targets,
            "positions": np.arange(len(inputs)),
            "segment_ids": np.ones(len(inputs), np.int32),
            "weights": asks.astype(np.float32),
        }

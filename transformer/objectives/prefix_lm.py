"""Prefix language modelling: the first part of each document is seen in both directions, the rest is predicted.

Liu et al. 2018 (arXiv:1801.10198); Raffel et al. 2020 (arXiv:1910.10683), section 3.2.1.
"""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective


class PrefixLM(TokenObjective):
    """The rest of each document from its beginning, which is seen both ways."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the window with a random part of each document as its prefix, from nothing to all but the last token.

        What is seen is not asked for: targets inside the prefix have weight 0.
        """
        segments = window["segment_ids"]
        sizes = np.bincount(segments, minlength=1)
        ends = rng.integers(0, np.maximum(sizes, 1))[segments]
        weights = window["weights"] * (window["positions"] + 1 >= ends)
        return window | {"prefix": window["positions"] < ends, "weights": weights}

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        return super().arrays(config) | {"prefix": (config.data.sequence_length, "bool")}

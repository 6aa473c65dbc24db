"""Prefix language modelling: the first part of each document is seen in both directions, the rest is predicted.

Liu et al. 2018 (arXiv:1801.10198); Raffel et al. 2020 (arXiv:1910.10683), section 3.2.1.
"""

import numpy as np

from transformer.config import Config
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import token_terms as terms
from transformer.objectives.terms import Row, token_arrays

__all__ = ["COUNTS_TEXT", "DATA", "arrays", "example", "num_extra_tokens", "terms", "window_length"]

DATA, COUNTS_TEXT = "text", False


def example(config: Config, tokenizer: Tokenizer, window: Row, rng: np.random.Generator) -> Row:
    """Returns the window with a random part of each document as its prefix, from nothing to all but the last token.

    What is seen is not asked for: targets inside the prefix have weight 0.
    """
    segments = window["segment_ids"]
    sizes = np.bincount(segments, minlength=1)
    ends = rng.integers(0, np.maximum(sizes, 1))[segments]
    weights = window["weights"] * (window["positions"] + 1 >= ends)
    return window | {"prefix": window["positions"] < ends, "weights": weights}


def arrays(config: Config) -> dict[str, tuple[int, str]]:
    return token_arrays(config.data.sequence_length) | {"prefix": (config.data.sequence_length, "bool")}


def window_length(config: Config) -> int:
    return config.data.sequence_length


def num_extra_tokens(config: Config) -> int:
    return 0

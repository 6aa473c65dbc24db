"""Causal language modelling: each token from those before it."""

import numpy as np

from transformer.config import Config
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import token_terms as terms
from transformer.objectives.terms import Row, token_arrays

__all__ = ["COUNTS_TEXT", "DATA", "arrays", "example", "num_extra_tokens", "terms", "window_length"]

DATA, COUNTS_TEXT = "text", True


def example(config: Config, tokenizer: Tokenizer, window: Row, rng: np.random.Generator) -> Row:
    """Returns the window: it is an example already."""
    return window


def arrays(config: Config) -> dict[str, tuple[int, str]]:
    return token_arrays(config.data.sequence_length)


def window_length(config: Config) -> int:
    return config.data.sequence_length


def num_extra_tokens(config: Config) -> int:
    return 0

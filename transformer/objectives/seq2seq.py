"""Sequence to sequence: each token of a text from those before it and a whole other text, as in translation.

Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2014 (arXiv:1409.0473); Vaswani et al. 2017 (arXiv:1706.03762).
"""

import numpy as np

from transformer.config import Config, source_length
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import token_terms as terms
from transformer.objectives.terms import Row, encoder_arrays, token_arrays

__all__ = ["COUNTS_TEXT", "DATA", "arrays", "example", "num_extra_tokens", "terms", "window_length"]

DATA, COUNTS_TEXT = "pairs", False


def example(config: Config, tokenizer: Tokenizer, window: Row, rng: np.random.Generator) -> Row:
    """Returns the row of pairs: it is an example already. `data.rows.RowSplit.window` says what is in it."""
    return window


def arrays(config: Config) -> dict[str, tuple[int, str]]:
    return encoder_arrays(source_length(config)) | token_arrays(config.data.sequence_length)


def window_length(config: Config) -> int:
    return config.data.sequence_length


def num_extra_tokens(config: Config) -> int:
    return 0

"""Sequence to sequence: each token of a text from those before it and a whole other text, as in translation.

Sutskever et al. 2014 (arXiv:1409.3215); Bahdanau et al. 2014 (arXiv:1409.0473); Vaswani et al. 2017 (arXiv:1706.03762).
"""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective


class Seq2Seq(TokenObjective):
    """A text from another."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of pairs; what is written begins with `model.decoder_start_token`, if there is one."""
        start = config.model.decoder_start_token
        if start is None:
            return window
        return window | {"inputs": np.where(window["positions"] == 0, start, window["inputs"])}

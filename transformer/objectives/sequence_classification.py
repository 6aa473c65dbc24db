"""Sequence classification: one class for each text, as in sentiment analysis.

A model that sees the past alone (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training",
section 3.2) tells it at the last token of the text, `eos`; one that sees everything (Devlin et al. 2019, arXiv:1810.04805,
section 4.1) at the first, `bos`.
"""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective


class SequenceClassification(TokenObjective):
    """A class for each text."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of texts with the class of each as the target of one of its tokens."""
        segments = window["segment_ids"]
        before = not config.model.has_encoder  # whether only what comes before a token is seen there
        other = np.append(segments[1:], 0) if before else np.append(0, segments[:-1])
        row = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        return row | {"targets": window["labels"], "weights": (segments != other).astype(np.float32)}

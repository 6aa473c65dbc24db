"""Token classification: a class for each word of a text, as in tagging and the recognition of names.

A model that sees everything tells it at the first token of the word (Devlin et al. 2019, arXiv:1810.04805, section 5.3); one
that sees the past alone at the last, where it has read the word.
"""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.sequence_classification import Classification


def _last_tokens(starts: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Returns where words end that begin at `starts`: before the next of the same text, or before its `eos`."""
    ends = np.searchsorted(segments, segments[starts], side="right") - 1
    return np.minimum(np.append(starts[1:], len(segments)), ends) - 1


class TokenClassification(Classification):
    """A class for each word."""

    UNIT = "word"

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of texts with the class of each word as the target of one of its tokens."""
        segments, labels = window["segment_ids"], window["labels"]
        starts = np.flatnonzero(labels >= 0)
        places = starts if config.model.has_encoder else _last_tokens(starts, segments)
        targets, weights = np.zeros(len(labels), np.int32), np.zeros(len(labels), np.float32)
        targets[places], weights[places] = labels[starts], 1
        row = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        return row | {"targets": targets, "weights": weights}

"""Filling in the middle: a causal model learns to write what stands between two texts (Bavarian et al. 2022,
arXiv:2207.14255).

A document that is taken apart becomes `PREFIX p SUFFIX s MIDDLE m END`, or with the suffix first (the paper's SPM, in its
second variant) `PREFIX SUFFIX s MIDDLE p m END`. It is cut between tokens; the begin of a text stays where it is, and END is
its end, wherever the text was cut.
"""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective

NUM_MARKS = 3
"""The marks PREFIX, SUFFIX and MIDDLE are the tokens after the tokenizer's, in this order."""
NUM_ADDED = NUM_MARKS + 1
"""Tokens by which a document grows."""


def question(tokenizer: Tokenizer, prefix: np.ndarray, suffix: np.ndarray, suffix_first: bool = False) -> np.ndarray:
    """Returns the tokens after which the middle comes; with the suffix first, after which it comes behind the prefix."""
    before, after, between = ([tokenizer.vocab_size + number] for number in range(NUM_MARKS))
    parts = [before, after, suffix, between, prefix] if suffix_first else [before, prefix, after, suffix, between]
    return np.concatenate(parts).astype(np.int32)


def _take_apart(tokens: np.ndarray, tokenizer: Tokenizer, suffix_first: bool, rng: np.random.Generator) -> np.ndarray:
    begin = tokens[:1] if tokens[0] == tokenizer.bos else tokens[:0]
    text = tokens[len(begin) : -1 if tokens[-1] == tokenizer.eos else None]
    start, stop = np.sort(rng.integers(0, len(text) + 1, 2))
    asked = question(tokenizer, text[:start], text[stop:], suffix_first)
    return np.concatenate([begin, asked, text[start:stop], [tokenizer.eos]]).astype(tokens.dtype)


class FillInTheMiddle(TokenObjective):
    """Documents whose middle was moved to the end."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the window with `middle_rate` of its documents taken apart, as long as their marks find room in the row."""
        room = (config.data.sequence_length - len(window["inputs"])) // NUM_ADDED
        rows: list[Window] = []
        for segment in np.unique(window["segment_ids"]):
            chosen = window["segment_ids"] == segment
            piece = {name: window[name][chosen] for name in ("inputs", "targets", "weights")}
            # The token after the last belongs to the document unless it is another's first.
            last = piece["targets"][-1:] if piece["weights"][-1] else piece["targets"][:0]
            tokens = np.append(piece["inputs"], last)
            takes_apart, suffix_first = rng.random(2) < (
                config.objective.middle_rate,
                config.objective.suffix_first_rate,
            )
            if takes_apart and room:
                room -= 1
                tokens = _take_apart(tokens, tokenizer, bool(suffix_first), rng)
            # Where the document's last token is not followed by another of its own, it is an input without a target.
            inputs = tokens[:-1] if len(last) else tokens
            targets = np.append(tokens[1:], [] if len(last) else piece["targets"][-1:]).astype(np.int32)
            weights = np.ones(len(inputs), np.float32)
            weights[len(inputs) - (not len(last)) :] = 0
            size, number = len(inputs), np.full(len(inputs), len(rows) + 1)
            named = ("inputs", inputs), ("targets", targets), ("weights", weights), ("segment_ids", number)
            rows.append(dict(named) | {"positions": np.arange(size)})
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def window_length(self, config: Config) -> int:
        """A sixteenth of the row is left for the marks; a document for which they find no room stays whole."""
        length = config.data.sequence_length
        return max(1, length - max(NUM_ADDED, length // 16))

    def num_extra_tokens(self, config: Config) -> int:
        return NUM_MARKS

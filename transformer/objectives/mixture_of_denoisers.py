"""A mixture of denoisers: short spans, long or many spans, and continuations (UL2, Tay et al. 2022, arXiv:2205.05131)."""

import numpy as np

from transformer.config import Config
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective
from transformer.objectives.span_corruption import NUM_MARKS, Spans, longest_window, pair, remove_spans

MODES = ("regular", "extreme", "sequential")
"""Each has a token, in this order the first after the tokenizer's, at the front of what is read; then come the marks."""

DENOISERS: tuple[tuple[str, Spans | None], ...] = (
    ("regular", Spans(0.15, 3.0)),
    ("regular", Spans(0.15, 8.0)),
    ("extreme", Spans(0.5, 3.0)),
    ("extreme", Spans(0.5, 8.0)),
    ("extreme", Spans(0.15, 64.0)),
    ("extreme", Spans(0.5, 64.0)),
    ("sequential", None),
)
"""Those of the paper's table 1, each as likely as the others; None: the last quarter on average, as one span."""

LONGEST_END = 0.5
"""Largest share of a text that `sequential` asks for: what it asks for is drawn evenly up to this."""


def _all_spans() -> tuple[Spans, ...]:
    # The longest that `sequential` reads and writes is what these two do.
    ends = (Spans(LONGEST_END, np.inf), Spans(0.0, np.inf))
    return (*(spans for _, spans in DENOISERS if spans is not None), *ends)


class MixtureOfDenoisers(TokenObjective):
    """What one of several denoisers removed."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the text of the window, as one text, under a denoiser that is drawn for it."""
        tokens = window["inputs"]
        if len(tokens) < 2:
            return {}
        mode, spans = DENOISERS[rng.integers(len(DENOISERS))]
        first_mark = tokenizer.vocab_size + len(MODES)
        if spans is None:
            removed = rng.integers(1, max(2, int(LONGEST_END * len(tokens)) + 1))
            source = np.append(tokens[:-removed], first_mark)
            target = np.append(first_mark, tokens[-removed:])
        else:
            source, target = remove_spans(tokens, spans, first_mark, rng)
        return pair(np.append(tokenizer.vocab_size + MODES.index(mode), source), target, tokenizer, config)

    def window_length(self, config: Config) -> int:
        return longest_window(config, _all_spans(), marks=1)

    def num_extra_tokens(self, config: Config) -> int:
        length = config.data.window_length or self.window_length(config)
        return len(MODES) + max(NUM_MARKS, *(spans.counts(length)[1] for spans in _all_spans()))

"""Span corruption: an encoder-decoder writes what was removed from a text (Raffel et al. 2020, arXiv:1910.10683, section
3.1.4).

Each removed span leaves a mark of its own in the text; the target is every mark followed by what stood in its place.
"""

from dataclasses import dataclass

import numpy as np

from transformer.config import Config, ConfigError, source_length
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.cross_entropy import TokenObjective

NUM_MARKS = 100
"""Marks are the tokens after the tokenizer's; T5 has a hundred, and longer texts as many as they need."""


@dataclass(frozen=True)
class Spans:
    """How much is removed, and in pieces of what mean length."""

    rate: float
    mean_length: float

    def counts(self, length: int) -> tuple[int, int]:
        """Returns how many tokens of `length` are removed, and in how many spans: numbers, not averages."""
        removed = min(max(round(length * self.rate), 1), length - 1)
        spans = min(max(round(removed / self.mean_length), 1), removed, length - removed)
        return removed, spans

    def lengths(self, length: int) -> tuple[int, int]:
        """Returns the lengths of what is read and of what is written, each with its end."""
        removed, spans = self.counts(length)
        return length - removed + spans + 1, removed + spans + 1


def remove_spans(
    tokens: np.ndarray, spans: Spans, first_mark: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the text with marks in the place of its spans, and the spans, each after its mark.

    The text is cut at random into as many kept pieces as removed ones, in alternation, a kept one first.
    """
    removed, count = spans.counts(len(tokens))
    kept = _cut(len(tokens) - removed, count, rng)
    ends = np.cumsum(np.stack([kept, _cut(removed, count, rng)], axis=1).reshape(-1))
    pieces = np.split(tokens, ends[:-1])
    marks = [np.array([first_mark + number], tokens.dtype) for number in range(count)]
    source = [part for piece, mark in zip(pieces[::2], marks, strict=True) for part in (piece, mark)]
    target = [part for piece, mark in zip(pieces[1::2], marks, strict=True) for part in (mark, piece)]
    return np.concatenate(source), np.concatenate(target)


def pair(source: np.ndarray, target: np.ndarray, tokenizer: Tokenizer, config: Config) -> Window:
    """Returns the row of one text to read and one to write, each ended, in which nothing else is."""
    start = config.model.decoder_start_token
    source, target = np.append(source, tokenizer.eos), np.append(target, tokenizer.eos)
    inputs = np.append(tokenizer.bos if start is None else start, target[:-1])
    row = {"encoder_inputs": source, "inputs": inputs, "targets": target}
    for prefix, tokens in (("encoder_", source), ("", target)):
        row |= {f"{prefix}positions": np.arange(len(tokens)), f"{prefix}segment_ids": np.ones(len(tokens), np.int32)}
    return row | {"weights": np.ones(len(target), np.float32)}


def longest_window(config: Config, denoisers: tuple[Spans, ...], marks: int = 0) -> int:
    """Returns the longest text that every denoiser turns into what `source_length` and `sequence_length` can hold.

    `marks` are further tokens at the front of what is read. Raises ConfigError if not even two tokens fit.
    """
    room = (source_length(config) - marks, config.data.sequence_length)

    def fits(length: int) -> bool:
        return all(np.all(np.array(spans.lengths(length)) <= room) for spans in denoisers)

    if not fits(2):
        lengths = f"data.source_length = {source_length(config)} and data.sequence_length = {room[1]}"
        raise ConfigError(f"{lengths} are too short for objective.name = {config.objective.name!r}: give at least 8")
    longest = 2
    while fits(longest + 1):
        longest += 1
    return longest


def _cut(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Cuts `length` into `count` parts of at least 1; every way of doing so is as likely as any other."""
    cuts = np.sort(rng.choice(length - 1, count - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [length]]))


def _spans(config: Config) -> Spans:
    return Spans(config.objective.mask_rate, config.objective.mean_span_length)


class SpanCorruption(TokenObjective):
    """Spans that were removed from a text."""

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the text of the window, its documents one after another as one text, with spans removed, and these."""
        if len(window["inputs"]) < 2:
            return {}
        source, target = remove_spans(window["inputs"], _spans(config), tokenizer.vocab_size, rng)
        return pair(source, target, tokenizer, config)

    def window_length(self, config: Config) -> int:
        return longest_window(config, (_spans(config),))

    def num_extra_tokens(self, config: Config) -> int:
        return max(NUM_MARKS, _spans(config).counts(config.data.window_length or self.window_length(config))[1])

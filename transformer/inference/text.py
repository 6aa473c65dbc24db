"""Text out of tokens that come a few at a time: in whole characters, and cut before a stop string."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transformer.data.tokenizers import Tokenizer


def ends_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the tokens that end what a model writes."""
    return tuple(dict.fromkeys((tokenizer.eos, *tokenizer.more_ends)))


@dataclass(frozen=True)
class Generation:
    """What the model wrote after, or about, one prompt."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    """The new tokens, those of a stop string too, the end-of-text token left out."""
    ended: bool
    """Whether the model or a stop string ended the text, rather than the limit of tokens."""
    score: float | None = None
    """Of a beam search: log-probability, the end included, over the length penalty."""


class Text:
    """The text of one row, decoded as its tokens come, so that a character of several tokens comes out whole."""

    def __init__(self, tokenizer: Tokenizer, begin: np.ndarray, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.ends = tokenizer, tuple(stop), ends_of(tokenizer)
        self.tokens: list[int] = begin.tolist()
        self.num_begin_tokens = len(self.tokens)
        self.text = ""
        self.ended = False
        # Tokens from `_start` on are decoded; those before `_read` are of the begin or already in `text`.
        self._start, self._read = 0, len(self.tokens)
        self._told = 0

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - self.num_begin_tokens

    def add(self, tokens: Sequence[int], last: bool) -> str:
        """Returns the new piece of text, empty when the text has ended.

        While a character is incomplete, or the text may be at the begin of a stop string, that part is held back; of
        the `last` tokens nothing is.
        """
        if self.stop and len(tokens) > 1:
            # One by one: a text must end at the same token, however many come together.
            ends = [last and number == len(tokens) - 1 for number in range(len(tokens))]
            return "".join(self.add([token], end) for token, end in zip(tokens, ends, strict=True))
        if self.ended:
            return ""
        places = [place for place, token in enumerate(tokens) if token in self.ends]
        self.ended = bool(places)
        self.tokens += tokens[: places[0]] if places else tokens
        self.text += self._decoded(last or self.ended)
        found = [place for stop in self.stop if (place := self.text.find(stop, self._told)) >= 0]
        if found:
            self.text, self.ended = self.text[: min(found)], True
        held = 0 if last or self.ended else self._begun()
        piece = self.text[self._told : len(self.text) - held]
        self._told += len(piece)
        return piece

    def generation(self, prompt: str, score: float | None = None) -> Generation:
        """Returns the whole of it."""
        return Generation(prompt, self.text, tuple(self.tokens[self.num_begin_tokens :]), self.ended, score)

    def _decoded(self, last: bool) -> str:
        before = self.tokenizer.decode(self.tokens[self._start : self._read])
        piece = self.tokenizer.decode(self.tokens[self._start :])[len(before) :]
        if piece.endswith("\ufffd") and not last:
            return ""
        self._start, self._read = self._read, len(self.tokens)
        return piece

    def _begun(self) -> int:
        """Returns how many characters at the end are the begin of a stop string."""
        longest = len(self.text) - self._told
        begun = [
            count
            for stop in self.stop
            for count in range(1, min(longest, len(stop) - 1) + 1)
            if self.text.endswith(stop[:count])
        ]
        return max(begun, default=0)

"""Answers to a question that stand in a passage, as in SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250).

A passage is tokenised word by word, marks by themselves, so that a token lies in one word and an answer, which is given in
characters, covers whole ones of its tokens.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer.config import ConfigError
from transformer.data.tokenizers import Tokenizer

Answer = tuple[int, str]
"""Where in the passage it begins, in characters, and its text."""

_WORD = re.compile(r"\s*(\w+|[^\w\s])")


def answers_of(value: Any, passage: str, where: str) -> list[Answer]:
    """Returns the answers in a record: lists `answer_start` and `text`, or a list of objects with one of each.

    No answer at all means that the passage has none (Rajpurkar et al. 2018, arXiv:1806.03822). Raises ConfigError for what
    is not of that form and for an answer that does not stand where it says.
    """
    if isinstance(value, Mapping):
        parts: list[Any] = [value.get("answer_start"), value.get("text")]
        if not all(isinstance(part, list | tuple | np.ndarray) for part in parts) or len(parts[0]) != len(parts[1]):
            raise ConfigError(f"{where} has an object there without lists of equal length 'answer_start' and 'text'")
        value = [{"answer_start": start, "text": text} for start, text in zip(*parts, strict=True)]
    if not isinstance(value, list | tuple | np.ndarray):
        raise ConfigError(f"{where} has {value!r} there: answers are lists 'answer_start' and 'text'")
    found: list[Answer] = []
    for answer in value:
        start, text = (answer.get("answer_start"), answer.get("text")) if isinstance(answer, Mapping) else (None, None)
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        if not isinstance(start, int | np.integer) or not isinstance(text, str):
            raise ConfigError(f"{where} has an answer {answer!r}: it needs 'answer_start' and 'text'")
        if not text.strip() or start < 0 or passage[start : start + len(text)] != text:
            there = passage[max(start, 0) : max(start, 0) + len(text)]
            raise ConfigError(f"{where} has the answer {text!r} at character {start}, where the passage has {there!r}")
        found.append((int(start), text))
    return found


class Passage:
    """A text in tokens, and the characters that each of them stands for."""

    def __init__(self, text: str, tokenizer: Tokenizer):
        self.text = text
        words = list(_WORD.finditer(text))
        pieces = [tokenizer.encode(word[0]) for word in words]
        self.ids = np.concatenate([np.zeros(0, np.int32), *pieces])
        counts = [len(piece) for piece in pieces]
        # Of each token the characters of its word.
        self.starts = np.repeat([word.start(1) for word in words], counts).astype(np.int64)
        self.ends = np.repeat([word.end(1) for word in words], counts).astype(np.int64)

    def span(self, answer: Answer) -> tuple[int, int]:
        """Returns the first and the last token of an answer."""
        start, text = answer[0] + len(answer[1]) - len(answer[1].lstrip()), answer[1].strip()
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.starts, start + len(text), side="left")) - 1
        return first, last

    def words(self, first: int, last: int) -> str:
        """Returns the text from one token to another."""
        return self.text[int(self.starts[first]) : int(self.ends[last])]


def encode(
    question: str, passage: Passage, answers: Sequence[Answer], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of `bos question eos passage eos`, and where the passage begins and each answer begins and ends.

    A question without an answer has one at `bos` (Devlin et al. 2019, arXiv:1810.04805, section 4.3).
    """
    begin, end = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
    asked = np.concatenate([begin, tokenizer.encode(question), end])
    spans = [passage.span(answer) for answer in answers]
    places = [place + len(asked) for span in dict.fromkeys(spans) for place in span] or [0, 0]
    return np.concatenate([asked, passage.ids, end]), np.array([len(asked), *places], np.int32)

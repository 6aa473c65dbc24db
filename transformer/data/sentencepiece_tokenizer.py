"""Tokenizers of SentencePiece's."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from transformer.config import ConfigError, write_atomically
from transformer.data.tokenizers import Ids, between, hash_of, save_config

_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_ENCODE_CHARACTERS = 2**20  # SentencePiece's memory grows by about a hundred bytes for each byte of one call


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226): one that we trained, or any other.

    What begins and ends a document is known to it, unless the model that it belongs to has other `ends`, or `more_ends` of what
    it writes.
    """

    def __init__(
        self,
        model: bytes,
        where: str = "tokenizer.model",
        ends: dict[str, int] | None = None,
        more_ends: Sequence[int] = (),
    ):
        self._model, self.fingerprint = model, hash_of("sentencepiece", model)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"data.tokenizer_path = {where!r} is not a SentencePiece model: {error}") from error
        own = {"bos": self._processor.bos_id(), "eos": self._processor.eos_id()}
        self._ends = {
            key: value for key, value in (ends or {}).items() if value < self.vocab_size and value != own[key]
        }
        found = [i for i in (own | self._ends).values() if i >= 0]
        if not found:
            raise ConfigError(f"data.tokenizer_path = {where!r} has neither a token for the begin nor for the end")
        self.bos, self.eos = found[0], found[-1]
        self.more_ends = tuple(end for end in more_ends if end < self.vocab_size)
        if self._ends:
            self.fingerprint = hash_of("sentencepiece", model + str(sorted(self._ends.items())).encode())
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_bytes = [] if self._processor.unk_id() in pieces else pieces
        self._is_text = np.array([not self._processor.is_control(i) for i in range(self.vocab_size)])

    def encode(self, text: str) -> np.ndarray:
        ids: list[int] = []
        for start in range(0, len(text), _ENCODE_CHARACTERS):
            part = text[start : start + _ENCODE_CHARACTERS]
            # The library would read this character as a space; spelled in bytes it survives.
            first, *others = part.split(_SPACE) if self._space_bytes else [part]
            ids += self._processor.encode(first)
            for other in others:
                ids += self._space_bytes + self._processor.encode(other)
        return np.array(ids, np.int32)

    def decode(self, ids: Ids) -> str:
        found = between(0, ids, self.vocab_size)
        return self._processor.decode(found[self._is_text[found]].tolist())

    def save(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer.model", self._model)
        more = {"more_ends": list(self.more_ends)} if self.more_ends else {}
        save_config(directory, kind="sentencepiece", **self._ends, **more)

    @classmethod
    def load(cls, directory: Path, more_ends: Sequence[int] = (), **ends: int) -> "SentencePieceTokenizer":
        return cls((directory / "tokenizer.model").read_bytes(), str(directory), ends, more_ends)

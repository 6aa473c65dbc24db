"""Tokenizers that need no training: raw bytes, and single characters."""

from pathlib import Path

import numpy as np

from transformer.config import BYTE_VOCAB_SIZE
from transformer.data.tokenizers import BOS, EOS, NUM_SPECIAL, UNK, Ids, between, hash_of, save_config


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 4."""

    vocab_size, bos, eos, fingerprint = BYTE_VOCAB_SIZE, BOS, EOS, "bytes"
    more_ends: tuple[int, ...] = ()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + NUM_SPECIAL

    def decode(self, ids: Ids) -> str:
        found = between(NUM_SPECIAL, ids, self.vocab_size) - NUM_SPECIAL
        return found.astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, directory: Path) -> None:
        save_config(directory, kind="bytes")

    @classmethod
    def load(cls, directory: Path) -> "ByteTokenizer":
        return cls()


class CharacterTokenizer:
    """One id for each character of an alphabet, in the order of code points, after the special tokens."""

    bos, eos = BOS, EOS
    more_ends: tuple[int, ...] = ()

    def __init__(self, characters: str):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = NUM_SPECIAL + len(self.characters)
        self.fingerprint = hash_of("characters", self.characters.encode())
        self._code_points = _code_points(self.characters)
        self._ids = np.full(0x110000, UNK, np.int32)
        self._ids[self._code_points] = np.arange(NUM_SPECIAL, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self._ids[_code_points(text)]

    def decode(self, ids: Ids) -> str:
        found = between(NUM_SPECIAL, ids, self.vocab_size) - NUM_SPECIAL
        return self._code_points[found].tobytes().decode("utf-32-le")

    def save(self, directory: Path) -> None:
        save_config(directory, kind="characters", characters=self.characters)

    @classmethod
    def load(cls, directory: Path, characters: str) -> "CharacterTokenizer":
        return cls(characters)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)

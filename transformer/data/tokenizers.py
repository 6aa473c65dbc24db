"""Tokenizers: SentencePiece, raw bytes, single characters, and Hugging Face's tokenizer.json, behind one protocol."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from transformer.config import BYTE_VOCAB_SIZE, ConfigError, write_atomically

PAD, BOS, EOS, UNK = 0, 1, 2, 3
"""The special tokens of every tokenizer that we make: padding, begin and end of a document, unknown."""

NUM_SPECIAL = 4

Ids = Sequence[int] | np.ndarray

_CONFIG_FILE = "tokenizer_config.json"


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into ids and back: `decode(encode(text)) == text`, except for characters it does not know."""

    vocab_size: int
    """Number of ids, special tokens included."""
    bos: int
    eos: int
    """Ids put before and after each document."""
    fingerprint: str
    """Hash of all that decides the ids."""

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 ids [tokens], without `bos` and `eos`."""
        ...

    def decode(self, ids: Ids) -> str:
        """Returns the text of `ids`; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` reads; the file that makes it complete comes last."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 4."""

    vocab_size, bos, eos, fingerprint = BYTE_VOCAB_SIZE, BOS, EOS, "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + NUM_SPECIAL

    def decode(self, ids: Ids) -> str:
        found = between(NUM_SPECIAL, ids, self.vocab_size) - NUM_SPECIAL
        return found.astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, directory: Path) -> None:
        save_config(directory, kind="bytes")


class CharacterTokenizer:
    """One id for each character of an alphabet, in the order of code points, after the special tokens."""

    bos, eos = BOS, EOS

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


def sentencepiece_tokenizer(model: bytes, where: str = "tokenizer.model") -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model."""
    module = importlib.import_module("transformer.data.sentencepiece_tokenizer")
    return module.SentencePieceTokenizer(model, where)


def huggingface_tokenizer(content: str, where: str = "tokenizer.json") -> Tokenizer:
    """Returns the tokenizer of a `tokenizer.json`; what it needs (extra `hf`) is loaded only here."""
    module = importlib.import_module("transformer.data.huggingface_tokenizer")
    return module.HuggingFaceTokenizer(content, where)


def is_saved(directory: Path) -> bool:
    """Returns whether `directory` holds a whole tokenizer."""
    return (directory / _CONFIG_FILE).exists()


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote. Raises ConfigError if `directory` holds none."""
    if not is_saved(directory):
        raise ConfigError(f"{directory} holds no tokenizer: {_CONFIG_FILE} is missing")
    config = json.loads((directory / _CONFIG_FILE).read_text())
    if config["kind"] == "sentencepiece":
        return sentencepiece_tokenizer((directory / "tokenizer.model").read_bytes(), str(directory))
    if config["kind"] == "huggingface":
        return huggingface_tokenizer((directory / "tokenizer.json").read_text(), str(directory))
    return CharacterTokenizer(config["characters"]) if config["kind"] == "characters" else ByteTokenizer()


def save_config(directory: Path, **config: str) -> None:
    """Writes the kind of a tokenizer and what belongs to it: the file that makes a saved tokenizer whole."""
    write_atomically(directory / _CONFIG_FILE, json.dumps(config) + "\n")


def hash_of(kind: str, content: bytes) -> str:
    """Returns the fingerprint of a tokenizer."""
    return f"{kind}-{hashlib.blake2b(content, digest_size=10).hexdigest()}"


def between(low: int, ids: Ids, high: int) -> np.ndarray:
    """Returns the ids of at least `low` and below `high`."""
    found = np.asarray(ids, np.int64).reshape(-1)
    return found[(found >= low) & (found < high)]


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)

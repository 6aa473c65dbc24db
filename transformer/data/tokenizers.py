"""Tokenizers: SentencePiece, raw bytes, single characters, and Hugging Face's tokenizer.json, behind one protocol."""

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from transformer.config import ConfigError, write_atomically

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
    more_ends: tuple[int, ...]
    """Ids that end what a published model writes, besides `eos`."""
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


KINDS: dict[str, tuple[str, str]] = {
    "bytes": ("transformer.data.plain_tokenizers", "ByteTokenizer"),
    "characters": ("transformer.data.plain_tokenizers", "CharacterTokenizer"),
    "sentencepiece": ("transformer.data.sentencepiece_tokenizer", "SentencePieceTokenizer"),
    "huggingface": ("transformer.data.huggingface_tokenizer", "HuggingFaceTokenizer"),
}
"""Module and class by kind, loaded when a saved tokenizer is of it; `load` is the reverse of `save`."""


def is_saved(directory: Path) -> bool:
    """Returns whether `directory` holds a whole tokenizer."""
    return (directory / _CONFIG_FILE).exists()


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote. Raises ConfigError if `directory` holds none."""
    if not is_saved(directory):
        raise ConfigError(f"{directory} holds no tokenizer: {_CONFIG_FILE} is missing")
    config = json.loads((directory / _CONFIG_FILE).read_text())
    module, name = KINDS[config.pop("kind")]
    return getattr(importlib.import_module(module), name).load(directory, **config)


def save_config(directory: Path, **config: str | int | list[int]) -> None:
    """Writes the kind of a tokenizer and what belongs to it: the file that makes a saved tokenizer whole."""
    write_atomically(directory / _CONFIG_FILE, json.dumps(config) + "\n")


def hash_of(kind: str, content: bytes) -> str:
    """Returns the fingerprint of a tokenizer."""
    return f"{kind}-{hashlib.blake2b(content, digest_size=10).hexdigest()}"


def between(low: int, ids: Ids, high: int) -> np.ndarray:
    """Returns the ids of at least `low` and below `high`."""
    found = np.asarray(ids, np.int64).reshape(-1)
    return found[(found >= low) & (found < high)]

"""Tokenizers: SentencePiece, raw bytes, single characters, and Hugging Face's tokenizer.json, behind one protocol."""

import hashlib
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from transformer.config import ConfigError, write_atomically

PAD, BOS, EOS, UNK = 0, 1, 2, 3
"""The special tokens of every tokenizer that we make: padding, begin and end of a document, unknown."""

NUM_SPECIAL = 4

_CONFIG_FILE = "tokenizer_config.json"
_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_ENCODE_CHARACTERS = 2**20  # SentencePiece's memory grows by about a hundred bytes for each byte of one call
_HUGGING_FACE_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]", "<|endoftext|>")
_HUGGING_FACE_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]")


@runtime_checkable
class Tokenizer(Protocol):
    """Turns text into ids and back: `decode(encode(text)) == text`, except for characters it does not know."""

    vocab_size: int
    """Number of ids, special tokens included."""
    bos: int
    """Id put before each document."""
    eos: int
    """Id put after each document."""

    def encode(self, text: str) -> np.ndarray:
        """Returns int32 ids [tokens], without `bos` and `eos`."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; special tokens have none, bytes that are not UTF-8 become U+FFFD."""
        ...

    def save(self, directory: Path) -> None:
        """Writes what `load_tokenizer` reads; the file that makes it complete comes last."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 4."""

    vocab_size, bos, eos = NUM_SPECIAL + 256, BOS, EOS
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + NUM_SPECIAL

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = np.asarray(ids, np.int64).reshape(-1) - NUM_SPECIAL
        return found[(found >= 0) & (found < 256)].astype(np.uint8).tobytes().decode(errors="replace")

    def save(self, directory: Path) -> None:
        _save(directory, {"kind": "bytes"})


class CharacterTokenizer:
    """One id for each character of an alphabet, in the order of code points, after the special tokens."""

    bos, eos = BOS, EOS

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        self.vocab_size = NUM_SPECIAL + len(self.characters)
        self.fingerprint = _hash("characters", self.characters.encode())
        self._code_points = _code_points(self.characters)
        self._ids = np.full(0x110000, UNK, np.int32)
        self._ids[self._code_points] = np.arange(NUM_SPECIAL, self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        return self._ids[_code_points(text)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = np.asarray(ids, np.int64).reshape(-1) - NUM_SPECIAL
        found = found[(found >= 0) & (found < len(self.characters))]
        return self._code_points[found].tobytes().decode("utf-32-le")

    def save(self, directory: Path) -> None:
        _save(directory, {"kind": "characters", "characters": self.characters})


class SentencePieceTokenizer:
    """A SentencePiece model (Kudo and Richardson 2018, arXiv:1808.06226): one that we trained, or any other."""

    def __init__(self, model: bytes, where: str = "tokenizer.model"):
        import sentencepiece

        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.vocab_size()
        except (RuntimeError, OSError) as error:
            raise ConfigError(f"data.tokenizer_path = {where!r} is not a SentencePiece model: {error}") from error
        ends = [i for i in (self._processor.bos_id(), self._processor.eos_id()) if i >= 0]
        if not ends:
            raise ConfigError(f"data.tokenizer_path = {where!r} has neither a token for the begin nor for the end")
        self.bos, self.eos = ends[0], ends[-1]
        self.fingerprint = _hash("sentencepiece", model)
        pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space_bytes = [] if self._processor.unk_id() in pieces else pieces
        self._is_text = np.array([not self._processor.is_control(i) for i in range(self.vocab_size)])

    def encode(self, text: str) -> np.ndarray:
        parts = [text[i : i + _ENCODE_CHARACTERS] for i in range(0, len(text), _ENCODE_CHARACTERS)]
        return np.array([i for ids in map(self._encode_part, parts) for i in ids], np.int32)

    def _encode_part(self, text: str) -> list[int]:
        # The library would read this character as a space; spelled in bytes it survives.
        first, *others = text.split(_SPACE) if self._space_bytes else [text]
        ids = self._processor.encode(first)
        for other in others:
            ids += self._space_bytes + self._processor.encode(other)
        return ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = np.asarray(ids, np.int64).reshape(-1)
        found = found[(found >= 0) & (found < self.vocab_size)]
        return self._processor.decode(found[self._is_text[found]].tolist())

    def save(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer.model", self._model)
        _save(directory, {"kind": "sentencepiece"})


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face (extra `hf`); its first and last tokens are known by their usual names."""

    def __init__(self, content: str, where: str = "tokenizer.json"):
        try:
            import tokenizers
        except ImportError as error:
            hint = "pip install 'transformer[hf]'"
            raise ConfigError(f"data.tokenizer = 'huggingface' needs the package tokenizers: {hint}") from error
        self._content = content
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"data.tokenizer_path = {where!r} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        found = []
        for what, names in (("begin", _HUGGING_FACE_BOS), ("end", _HUGGING_FACE_EOS)):
            ids = [vocabulary[name] for name in names if name in vocabulary]
            if not ids:
                problem = f"no token for the {what} of a document, none of {', '.join(names)}"
                raise ConfigError(f"data.tokenizer_path = {where!r} has {problem}")
            found.append(ids[0])
        self.bos, self.eos = found
        self.fingerprint = _hash("huggingface", content.encode())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).reshape(-1).tolist(), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer.json", self._content)
        _save(directory, {"kind": "huggingface"})


def is_saved(directory: Path) -> bool:
    """Returns whether `directory` holds a whole tokenizer."""
    return (directory / _CONFIG_FILE).exists()


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote. Raises ConfigError if `directory` holds none."""
    if not is_saved(directory):
        raise ConfigError(f"{directory} holds no tokenizer: {_CONFIG_FILE} is missing")
    config = json.loads((directory / _CONFIG_FILE).read_text())
    if config["kind"] == "sentencepiece":
        return SentencePieceTokenizer((directory / "tokenizer.model").read_bytes(), str(directory))
    if config["kind"] == "huggingface":
        return HuggingFaceTokenizer((directory / "tokenizer.json").read_text(), str(directory))
    return CharacterTokenizer(config["characters"]) if config["kind"] == "characters" else ByteTokenizer()


def read_tokenizer(kind: str, name: str) -> Tokenizer:
    """Returns the tokenizer in the file, or saved directory, at data.tokenizer_path. Raises ConfigError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return load_tokenizer(path)
    if not path.is_file():
        raise ConfigError(f"data.tokenizer_path = {str(path)!r} does not exist")
    if kind == "huggingface":
        return HuggingFaceTokenizer(path.read_bytes().decode(errors="replace"), str(path))
    return SentencePieceTokenizer(path.read_bytes(), str(path))


def train_sentencepiece(texts: Iterable[str], kind: str, vocab_size: int) -> SentencePieceTokenizer:
    """Returns a lossless SentencePiece model, `bpe` or `unigram`, trained on `texts`; the same for the same texts.

    Spaces may form pieces of their own, so that indentation is cheap; what has no piece is spelled in bytes.
    Raises ConfigError if the texts support no vocabulary of `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    # The trainer skips sentences that are too long, so it gets pieces of documents.
    sentences = (text[i : i + 2000] for text in texts for i in range(0, len(text), 2000))
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8001,
            # Part of the model file, and unigram's sums depend on it: never the number of cores.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        limit = re.search(r"<= (\d+)|\d+ vs (\d+)", str(error))
        most, least = limit.groups() if limit else (None, None)
        allowed = f"at most {most}" if most else f"at least {least}" if least else str(error)
        if least:
            allowed += " (256 bytes, the special tokens and the corpus's characters)"
        problem = f"the corpus does not support it, {kind} can have {allowed}"
        raise ConfigError(f"data.tokenizer_vocab_size = {vocab_size}: {problem}") from error
    return SentencePieceTokenizer(model.getvalue())


def _save(directory: Path, config: dict[str, str]) -> None:
    write_atomically(directory / _CONFIG_FILE, json.dumps(config) + "\n")


def _hash(kind: str, content: bytes) -> str:
    return f"{kind}-{hashlib.blake2b(content, digest_size=10).hexdigest()}"


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)

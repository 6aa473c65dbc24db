"""From text to shards of tokens: once for each corpus, tokenizer and way of cutting, and restartable.

Stages, each atomic and named by what it depends on: the documents (a TFDS dataset), their sizes and hashes, the
tokenizer, the shards. A shard holds consecutive documents, chosen by their size alone, and is tokenised and written by
itself, so that neither a kill nor the number of workers changes a byte. `index.json`, written last, makes it whole.
"""

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from transformer.config import Config, ConfigError, write_atomically
from transformer.data import files, shards, sources, tokenizers
from transformer.data.shards import Shard, Split
from transformer.data.sources import Corpus, Documents
from transformer.data.tokenizers import Tokenizer
from transformer.data.workers import Workers

FORMAT = 1
"""Version of what lies in the cache; raise it whenever the same input gives other files."""

SHARD_BYTES, MAX_SHARDS = 2**20, 512
"""Text in a shard at least, and shards in a split at most: large corpora get larger shards."""

TOKENIZER_SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on, over all sources."""

Part = Literal["whole", "head", "tail"]


@dataclass(frozen=True)
class Source:
    """The two splits of one source."""

    name: str
    train: Split
    validation: Split


@dataclass(frozen=True)
class Prepared:
    """What the batches are made from."""

    directory: Path
    """Where the shards lie, a directory for each source."""
    tokenizer: Tokenizer
    fingerprint: str
    """Changes whenever a token does: of the corpora, the tokenizer and the way of cutting."""
    sources: tuple[Source, ...]


def prepare(config: Config, show_progress: bool = True) -> Prepared:
    """Returns what is prepared for `config.data`, making what is missing; processes may call it at the same moment.

    Raises ConfigError for sources, texts and tokenizers that cannot be used.
    """
    data, root = config.data, sources.cache_dir(config) / "tokens"
    cuts = (data.validation_documents, data.validation_tail, data.sequence_length, SHARD_BYTES, MAX_SHARDS)
    with Workers(data.num_workers, show_progress) as workers:
        corpora = sources.open_sources(config)
        tokenizer, saved = _tokenizer(config, corpora, workers)
        keys = [files.fingerprint(FORMAT, corpus.fingerprint, tokenizer.fingerprint, cuts) for corpus in corpora]
        for corpus, key in zip(corpora, keys, strict=True):
            with files.locked(root / key):
                if not (root / key / "index.json").exists():
                    _write_shards(config, corpus, tokenizer, saved, root / key, workers)
    return Prepared(root, tokenizer, files.fingerprint(keys), tuple(_read_index(root / key) for key in keys))


def split_texts(config: Config, name: Literal["train", "validation"]) -> Iterator[str]:
    """Yields the texts of a split, source by source, in order: what a model is trained or measured on."""
    with Workers(config.data.num_workers, False) as workers:
        for corpus in sources.open_sources(config):
            part, numbers, *_ = _survey(config, corpus, workers).split(name)
            for number in numbers:
                if text := _cut(corpus.documents[number], part, config):
                    yield text


# Documents: which belong to which split.


@dataclass(frozen=True)
class _Survey:
    """The documents that have text: number, bytes and hash of each [documents], and whether it is held out."""

    table: np.ndarray
    held_out: np.ndarray | None
    """None: the last part of every document is held out."""

    def split(self, name: str) -> tuple[Part, np.ndarray, np.ndarray, np.ndarray]:
        """Returns which part of its documents a split takes, and their numbers, bytes and hashes."""
        if self.held_out is None:
            return "head" if name == "train" else "tail", *self.table
        return "whole", *self.table[:, self.held_out == (name == "validation")]


def _survey(config: Config, corpus: Corpus, workers: Workers) -> _Survey:
    """Reads every document once (the result is kept) and divides them by the hash of their text.

    A document's side depends on nothing but its own text, so adding documents moves none.
    """
    data = config.data
    path = sources.cache_dir(config) / "documents" / files.fingerprint(FORMAT, corpus.fingerprint) / "table.npy"
    with files.locked(path.parent):
        if not path.exists():
            total = len(corpus.documents)
            step = max(64, -(-total // 1000))
            tasks = [(corpus.documents, range(i, min(i + step, total))) for i in range(0, total, step)]
            found = workers.map(_measure, tasks, f"reading {corpus.name}")
            content = io.BytesIO()
            np.save(content, np.concatenate([np.zeros((3, 0), np.uint64), *found], axis=1))
            write_atomically(path, content.getvalue())
    table = np.load(path)
    table = table[:, table[1] > 0]
    if not table.size:
        raise ConfigError(f"the corpus is empty: no document of {corpus.name} has text")
    if data.validation_tail is not None or table.shape[1] == 1:
        return _Survey(table, None)
    held_out = table[2] / 2.0**64 < data.validation_documents
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"data.validation_documents = {data.validation_documents}: {'all' if held_out.all() else 'none'} of the "
            f"{held_out.size} documents of {corpus.name} fall into the validation split; change it, or set "
            "data.validation_tail = 0.1 to hold out the last part of each document"
        )
    return _Survey(table, held_out)


def _measure(task: tuple[Documents, range]) -> np.ndarray:
    documents, numbers = task
    table = np.empty((3, len(numbers)), np.uint64)
    for column, number in enumerate(numbers):
        data = documents[number].encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        table[:, column] = number, len(data), int.from_bytes(digest, "little")
    return table


def _cut(text: str, part: Part, config: Config) -> str:
    if part == "whole":
        return text
    tail = config.data.validation_tail
    end = int(len(text) * (1 - (0.1 if tail is None else tail)))
    return text[:end] if part == "head" else text[end:]


def _groups(numbers: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Cuts a list of documents into runs of about equal size, which only the documents determine."""
    before = np.cumsum(sizes) - sizes
    limit = max(SHARD_BYTES, -(-int(sizes.sum()) // MAX_SHARDS))
    return np.split(numbers, np.flatnonzero(np.diff(before // np.uint64(limit))) + 1)


# Tokenizer.


def _tokenizer(config: Config, corpora: Sequence[Corpus], workers: Workers) -> tuple[Tokenizer, Path]:
    """Returns the tokenizer and where it is saved; it is trained if no run did before."""
    data = config.data
    given = tokenizers.read_tokenizer(data.tokenizer, data.tokenizer_path) if data.tokenizer_path else None
    depends: list[object] = [FORMAT, data.tokenizer, given and given.fingerprint]
    if not given and data.tokenizer != "bytes":
        depends += [corpus.fingerprint for corpus in corpora]
    if not given and data.tokenizer in ("bpe", "unigram"):
        depends += [data.tokenizer_vocab_size, data.validation_documents, data.validation_tail, TOKENIZER_SAMPLE_BYTES]
    directory = sources.cache_dir(config) / "tokenizers" / files.fingerprint(*depends)
    with files.locked(directory):
        if not tokenizers.is_saved(directory):
            (given or _new_tokenizer(config, corpora, workers)).save(directory)
    return tokenizers.load_tokenizer(directory), directory


def _new_tokenizer(config: Config, corpora: Sequence[Corpus], workers: Workers) -> Tokenizer:
    kind, size = config.data.tokenizer, config.data.tokenizer_vocab_size
    if kind == "bytes":
        return tokenizers.ByteTokenizer()
    surveys = [_survey(config, corpus, workers) for corpus in corpora]
    if kind == "characters":
        pairs = zip(corpora, surveys, strict=True)
        tasks = [(corpus.documents, group) for corpus, survey in pairs for group in _groups(*survey.table[:2])]
        return tokenizers.CharacterTokenizer("".join(workers.map(_alphabet, tasks, "collecting characters")))
    assert kind != "huggingface", "validated: it comes from a file"
    workers.say(f"training a tokenizer: {kind}, {size} tokens")
    return tokenizers.train_sentencepiece(_sample(config, corpora, surveys), kind, size)


def _alphabet(task: tuple[Documents, np.ndarray]) -> str:
    documents, numbers = task
    return "".join(sorted(set().union(*(documents[number] for number in numbers))))


def _sample(config: Config, corpora: Sequence[Corpus], surveys: Sequence[_Survey]) -> Iterator[str]:
    """Yields training documents, in the order of their hashes, up to TOKENIZER_SAMPLE_BYTES; sources in proportion."""
    total = sum(int(survey.table[1].sum()) for survey in surveys)
    for corpus, survey in zip(corpora, surveys, strict=True):
        part, numbers, _, hashes = survey.split("train")
        left = int(survey.table[1].sum()) * TOKENIZER_SAMPLE_BYTES // max(total, TOKENIZER_SAMPLE_BYTES)
        for number in numbers[np.argsort(hashes, kind="stable")]:
            if left <= 0:
                break
            text = _cut(corpus.documents[number], part, config)[:left]
            left -= len(text.encode())
            yield text


# Shards.


@dataclass(frozen=True)
class _ShardTask:
    path: Path
    config: Config
    documents: Documents
    numbers: np.ndarray
    part: Part
    tokenizer: Path


def _write_shards(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, saved: Path, directory: Path, workers: Workers
) -> None:
    """Writes the shards that are missing and then the index; the caller holds the lock of `directory`."""
    for killed in directory.glob(".*.partial"):
        killed.unlink()
    survey = _survey(config, corpus, workers)
    tasks = []
    for name in ("train", "validation"):
        part, numbers, sizes, _ = survey.split(name)
        for i, group in enumerate(_groups(numbers, sizes)):
            path = directory / f"{name}-{i:05d}.array_record"
            tasks.append(_ShardTask(path, config, corpus.documents, group, part, saved))
    written = workers.map(_write_shard, tasks, f"tokenising {corpus.name}")
    splits = {name: [shard for shard in written if shard.file.startswith(name)] for name in ("train", "validation")}
    for name, parts in splits.items():
        if not sum(shard.length - shard.num_documents for shard in parts):
            tail = "data.validation_tail leaves no text in" if survey.held_out is None else "no token in"
            raise ConfigError(f"{tail} the {name} split of {corpus.name}")
    index = {"name": corpus.name, "sequence_length": config.data.sequence_length}
    index["token_type"] = shards.token_type(tokenizer.vocab_size)
    index |= {name: [dataclasses.asdict(shard) for shard in parts] for name, parts in splits.items()}
    write_atomically(directory / "index.json", json.dumps(index, indent=1) + "\n")


def _read_index(directory: Path) -> Source:
    index = json.loads((directory / "index.json").read_text())

    def split(name: str) -> Split:
        parts = tuple(Shard(**shard) for shard in index[name])
        return Split(name, directory, index["sequence_length"], index["token_type"], parts)

    return Source(index["name"], split("train"), split("validation"))


_load_once = functools.lru_cache(maxsize=1)(tokenizers.load_tokenizer)


def _write_shard(task: _ShardTask) -> Shard:
    """Tokenises the documents of a shard, each as `bos` ids `eos`, unless that was done before.

    The first part of a document has no `eos`, for the document does not end there.
    """
    if task.path.exists():
        return shards.describe_shard(task.path)
    tokenizer = _load_once(task.tokenizer)
    ends = np.array([tokenizer.bos, tokenizer.eos], np.int32)
    documents, num_bytes = [], 0
    for number in task.numbers:
        if text := _cut(task.documents[number], task.part, task.config):
            documents.append(np.concatenate([ends[:1], tokenizer.encode(text), ends[1 + (task.part == "head") :]]))
            num_bytes += len(text.encode())
    return shards.write_shard(task.path, documents, num_bytes, tokenizer.vocab_size, task.config.data.sequence_length)

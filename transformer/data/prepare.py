"""From text to shards of tokens: once for each corpus, tokenizer and way of cutting, and restartable.

Stages, each atomic and named by what it depends on: the documents (a TFDS dataset), their sizes and hashes, the
tokenizer, the shards. A shard holds consecutive documents, chosen by their size alone, and is tokenised and written by
itself, so that neither a kill nor the number of workers changes a byte. `index.json`, written last, makes it whole.
"""

import dataclasses
import errno
import functools
import hashlib
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from transformer.config import Config, ConfigError, from_json, window_length, write_atomically
from transformer.data import files, new_tokenizer, shards, sources, tokenizers
from transformer.data.prepared import SPLITS, Prepared, load_prepared
from transformer.data.shards import Shard
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
Division = dict[str, tuple[Part, np.ndarray]]
"""For each split, which part of its documents it takes, and a table of number, bytes and hash of each [3, documents]."""


def prepare(config: Config, show_progress: bool = True) -> Prepared:
    """Returns what is prepared for `config.data`, making what is missing; processes may call it at the same moment.

    Raises ConfigError for sources, texts and tokenizers that cannot be used.
    """
    return load_prepared(*_make(config, show_progress))


def main() -> None:
    """The process that `prepare_apart` starts: a configuration comes in, the arguments of `load_prepared` go out."""
    config = from_json(json.loads(sys.stdin.readline()))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    try:
        answer = dict(
            zip(("tokenizer", "fingerprint", "sources"), _make(config, "--quiet" not in sys.argv), strict=True)
        )
    except ConfigError as error:
        answer = {"problems": error.problems}
    except OSError as error:
        if error.errno is None:
            raise
        answer = {"errno": error.errno, "about": [error.strerror, *([str(error.filename)] if error.filename else [])]}
    except RuntimeError as error:  # ArrayRecord's, which tells in words what the disk said
        found = [
            code for code in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO) if os.strerror(code) in str(error)
        ]
        if not found:
            raise
        answer = {"errno": found[0], "about": [str(error)]}
    print(json.dumps(answer), flush=True)


def _make(config: Config, show_progress: bool) -> tuple[str, str, list[str]]:
    """Makes what is missing; returns where the tokenizer is, the fingerprint, and where the shards of each source are."""
    data, root = config.data, sources.cache_dir(config) / "tokens"
    cuts = (data.validation_documents, data.validation_tail, window_length(config), SHARD_BYTES, MAX_SHARDS)
    with Workers(data.num_workers, show_progress) as workers:
        corpora = sources.open_sources(config)
        tokenizer, saved = _tokenizer(config, corpora, workers)
        keys = [files.fingerprint(FORMAT, corpus.fingerprint, tokenizer.fingerprint, cuts) for corpus in corpora]
        for corpus, key in zip(corpora, keys, strict=True):
            with files.locked(root / key):
                if not (root / key / "index.json").exists():
                    _write_shards(config, corpus, tokenizer, saved, root / key, workers)
    return str(saved), files.fingerprint(keys), [str(root / key) for key in keys]


def split_texts(config: Config, name: Literal["train", "validation"]) -> Iterator[str]:
    """Yields the texts of a split, source by source, in order: what a model is trained or measured on."""
    with Workers(config.data.num_workers, False) as workers:
        for corpus in sources.open_sources(config):
            part, (numbers, *_) = _divide(config, corpus, workers)[name]
            yield from _texts(config, corpus.documents, part, numbers)


def _texts(config: Config, documents: Documents, part: Part, numbers: np.ndarray) -> Iterator[str]:
    tail = 0.1 if config.data.validation_tail is None else config.data.validation_tail
    for number in numbers:
        text = documents[number]
        end = int(len(text) * (1 - tail))
        if text := text if part == "whole" else text[:end] if part == "head" else text[end:]:
            yield text


def _divide(config: Config, corpus: Corpus, workers: Workers) -> Division:
    """Reads every document once (the result is kept) and divides those with text by its hash.

    A document's side depends on nothing but its own text, so adding documents moves none.
    """
    data = config.data
    path = sources.cache_dir(config) / "documents" / files.fingerprint(FORMAT, corpus.fingerprint) / "table.npy"
    with files.locked(path.parent):
        if not path.exists():
            total = len(corpus.documents.records)
            step = max(64, -(-total // 1000))
            tasks = [range(i, min(i + step, total)) for i in range(0, total, step)]
            found = workers.map(functools.partial(_measure, corpus.documents), tasks, f"reading {corpus.name}")
            content = io.BytesIO()
            np.save(content, np.concatenate([np.zeros((3, 0), np.uint64), *found], axis=1))
            write_atomically(path, content.getvalue())
    table = np.load(path)
    table = table[:, table[1] > 0]
    if not table.size:
        raise ConfigError(f"the corpus is empty: no document of {corpus.name} has text")
    if data.validation_tail is not None or table.shape[1] == 1:
        return {"train": ("head", table), "validation": ("tail", table)}
    held_out = table[2] / 2.0**64 < data.validation_documents
    if held_out.all() or not held_out.any():
        raise ConfigError(
            f"data.validation_documents = {data.validation_documents}: {'all' if held_out.all() else 'none'} of the "
            f"{held_out.size} documents of {corpus.name} fall into the validation split; change it, or set "
            "data.validation_tail = 0.1 to hold out the last part of each document"
        )
    return {"train": ("whole", table[:, ~held_out]), "validation": ("whole", table[:, held_out])}


def _measure(documents: Documents, numbers: range) -> np.ndarray:
    table = np.empty((3, len(numbers)), np.uint64)
    for column, number in enumerate(numbers):
        data = documents[number].encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        table[:, column] = number, len(data), int.from_bytes(digest, "little")
    return table


def _groups(table: np.ndarray) -> list[np.ndarray]:
    """Cuts a list of documents into runs of about equal size, which only the documents determine."""
    numbers, sizes, _ = table.astype(np.int64)
    limit = max(SHARD_BYTES, -(-int(sizes.sum()) // MAX_SHARDS))
    return np.split(numbers, np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // limit)) + 1)


# Tokenizer.


def _tokenizer(config: Config, corpora: Sequence[Corpus], workers: Workers) -> tuple[Tokenizer, Path]:
    """Returns the tokenizer and where it is saved; it is trained if no run did before."""
    data = config.data
    given = new_tokenizer.read_tokenizer(data.tokenizer, data.tokenizer_path) if data.tokenizer_path else None
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
    divisions = [_divide(config, corpus, workers) for corpus in corpora]
    if kind == "characters":
        alphabets = []
        for corpus, division in zip(corpora, divisions, strict=True):
            groups = [group for name in SPLITS for group in _groups(division[name][1])]
            found = functools.partial(_alphabet, corpus.documents)
            alphabets += workers.map(found, groups, f"collecting the characters of {corpus.name}")
        return tokenizers.CharacterTokenizer("".join(alphabets))
    assert kind != "huggingface", "validated: it comes from a file"
    workers.say(f"training a tokenizer: {kind}, {size} tokens")
    return new_tokenizer.train_sentencepiece(_sample(config, corpora, [d["train"] for d in divisions]), kind, size)


def _alphabet(documents: Documents, numbers: np.ndarray) -> str:
    return "".join(sorted(set().union(*(documents[number] for number in numbers))))


def _sample(config: Config, corpora: Sequence[Corpus], parts: Sequence[tuple[Part, np.ndarray]]) -> Iterator[str]:
    """Yields training documents, in the order of their hashes, up to TOKENIZER_SAMPLE_BYTES; sources in proportion."""
    sizes = [int(table[1].sum()) for _, table in parts]
    for corpus, (part, table), size in zip(corpora, parts, sizes, strict=True):
        left = size * TOKENIZER_SAMPLE_BYTES // max(sum(sizes), TOKENIZER_SAMPLE_BYTES)
        for text in _texts(config, corpus.documents, part, table[0][np.argsort(table[2], kind="stable")]):
            yield text[:left]
            left -= len(text.encode())
            if left <= 0:
                break


# Shards.


def _write_shards(
    config: Config, corpus: Corpus, tokenizer: Tokenizer, saved: Path, directory: Path, workers: Workers
) -> None:
    """Writes the shards that are missing and then the index; the caller holds the lock of `directory`."""
    for killed in directory.glob(".*.partial"):
        killed.unlink()
    tasks = []
    for name, (part, table) in _divide(config, corpus, workers).items():
        groups = enumerate(_groups(table))
        tasks += [(directory / f"{name}-{i:05d}.array_record", part, numbers) for i, numbers in groups]
    write = functools.partial(_write_shard, config, corpus.documents, saved)
    written = workers.map(write, tasks, f"tokenising {corpus.name}")
    index: dict[str, object] = {"name": corpus.name, "sequence_length": window_length(config)}
    index["token_type"] = shards.token_type(tokenizer.vocab_size)
    for name in SPLITS:
        own = [shard for shard in written if shard.file.startswith(name)]
        if not sum(shard.length - shard.num_documents for shard in own):
            raise ConfigError(f"the {name} split of {corpus.name} has no text: change data.validation_tail")
        index[name] = [dataclasses.asdict(shard) for shard in own]
    write_atomically(directory / "index.json", json.dumps(index, indent=1) + "\n")


_load_once = functools.lru_cache(maxsize=1)(tokenizers.load_tokenizer)


def _write_shard(config: Config, documents: Documents, saved: Path, task: tuple[Path, Part, np.ndarray]) -> Shard:
    """Tokenises the documents of a shard, each as `bos` ids `eos`, unless that was done before.

    The first part of a document has no `eos`, for the document does not end there.
    """
    path, part, numbers = task
    if path.exists():
        return shards.describe_shard(path)
    tokenizer = _load_once(saved)
    begin, end = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
    ids, num_bytes = [], 0
    for text in _texts(config, documents, part, numbers):
        ids.append(np.concatenate([begin, tokenizer.encode(text), end[: part != "head"]]))
        num_bytes += len(text.encode())
    return shards.write_shard(path, ids, num_bytes, tokenizer.vocab_size, window_length(config))

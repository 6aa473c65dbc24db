"""From text to shards of tokens: once for each corpus, tokenizer and way of cutting, and restartable.

Stages, each atomic and named by what it depends on: the documents (a TFDS dataset), their sizes and hashes, the
tokenizer, the shards. A shard holds consecutive documents, chosen by their size alone, and is tokenised and written by
itself, so that neither a kill nor the number of workers changes a byte. `index.json`, written last, makes it whole.
"""

import dataclasses
import errno
import functools
import importlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from transformer.config import Config, ConfigError, from_json, window_length, write_atomically
from transformer.data import (
    division,
    files,
    new_tokenizer,
    packing,
    plain_tokenizers,
    shards,
    sources,
    tokenizers,
    writing,
)
from transformer.data.division import FORMAT, Division, Portion
from transformer.data.forms import Form, form_of
from transformer.data.packing import Labels
from transformer.data.prepared import SPLITS, Prepared, load_prepared
from transformer.data.rows import RowShard
from transformer.data.shards import Shard
from transformer.data.sources import Corpus, Documents
from transformer.data.tokenizers import Tokenizer
from transformer.data.workers import Workers

SHARD_BYTES, MAX_SHARDS = 2**20, 512
"""Text in a shard at least, and shards in a split at most: large corpora get larger shards."""

TOKENIZER_SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on, over all sources."""


def prepare(config: Config, show_progress: bool = True) -> Prepared:
    """Returns what is prepared for `config.data`, making what is missing; processes may call it at the same moment.

    Raises ConfigError for sources, texts and tokenizers that cannot be used.
    """
    with Workers(config.data.num_workers, show_progress) as workers:
        return load_prepared(*make(config, workers))


def main() -> None:
    """The process that `prepare_apart` starts: a configuration comes in, the arguments of `load_prepared` go out."""
    config = from_json(json.loads(sys.stdin.readline()))
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    try:
        with Workers(config.data.num_workers, "--quiet" not in sys.argv) as workers:
            answer = dict(zip(("tokenizer", "fingerprint", "sources"), make(config, workers), strict=True))
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


def make(config: Config, workers: Workers) -> tuple[str, str, list[str]]:
    """Makes what is missing; returns where the tokenizer is, the fingerprint, and where the shards of each source are."""
    data, root = config.data, sources.cache_dir(config) / "tokens"
    if data.prepared:
        return importlib.import_module("transformer.data.published").fetch(config, workers.say)
    form = form_of(config)
    lengths = (window_length(config),) if form.kind == "text" else packing.capacity(config)
    cuts = (data.validation_documents, data.validation_tail, *lengths, SHARD_BYTES, MAX_SHARDS)
    corpora = sources.open_sources(config)
    tokenizer, saved = _tokenizer(config, corpora, workers)
    # The numbers of named labels follow from all sources together.
    others = [corpus.fingerprint for corpus in corpora] if form.kind == "labelled" else ()
    keys = [files.fingerprint(FORMAT, corpus.fingerprint, tokenizer.fingerprint, cuts, *others) for corpus in corpora]
    for corpus, key in zip(corpora, keys, strict=True):
        with files.locked(root / key):
            if not (root / key / "index.json").exists():
                _write_shards(config, corpora, corpus, tokenizer, saved, root / key, workers)
        for message in packing.left_out(config, root / key) if form.kind != "text" else ():
            workers.say(message)
    return str(saved), files.fingerprint(keys), [str(root / key) for key in keys]


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
    depends += [template] if (template := getattr(given, "chat_template", "")) else []
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
        return plain_tokenizers.ByteTokenizer()
    form, divisions = form_of(config), [division.divide(config, corpus, workers) for corpus in corpora]
    if kind == "characters":
        alphabets = []
        for corpus, parts in zip(corpora, divisions, strict=True):
            tasks = [(portion.documents, group) for portion, table in parts.values() for group in _groups(table)]
            found = functools.partial(_alphabet, form)
            alphabets += workers.map(found, tasks, f"collecting the characters of {corpus.name}")
        return plain_tokenizers.CharacterTokenizer("".join(alphabets))
    assert kind != "huggingface", "validated: it comes from a file"
    workers.say(f"training a tokenizer: {kind}, {size} tokens")
    return new_tokenizer.train_sentencepiece(_sample(config, [d["train"] for d in divisions]), kind, size)


def _alphabet(form: Form, task: tuple[Documents, np.ndarray]) -> str:
    documents, numbers = task
    return "".join(sorted(set().union(*(text for number in numbers for text in form.texts(documents[number])))))


def _sample(config: Config, parts: Sequence[tuple[Portion, np.ndarray]]) -> Iterator[str]:
    """Yields training texts, in the order of their documents' hashes, up to TOKENIZER_SAMPLE_BYTES; sources in proportion."""
    form, sizes = form_of(config), [int(table[1].sum()) for _, table in parts]
    for (portion, table), size in zip(parts, sizes, strict=True):
        left = size * TOKENIZER_SAMPLE_BYTES // max(sum(sizes), TOKENIZER_SAMPLE_BYTES)
        documents = division.read(config, portion, table[0][np.argsort(table[2], kind="stable")])
        for text in (text for document in documents for text in form.texts(document)):
            yield text[:left]
            left -= len(text.encode())
            if left <= 0:
                break


# Shards.


def _write_shards(
    config: Config,
    corpora: Sequence[Corpus],
    corpus: Corpus,
    tokenizer: Tokenizer,
    saved: Path,
    directory: Path,
    workers: Workers,
) -> None:
    """Writes the shards that are missing and then the index; the caller holds the lock of `directory`."""
    for killed in directory.glob(".*.partial"):
        killed.unlink()
    kind, parts = form_of(config).kind, division.divide(config, corpus, workers)
    labels = Labels()
    if kind == "labelled":
        labels = packing.collect_labels(config, corpora, workers)
    tasks = []
    for name, (portion, table) in parts.items():
        groups = enumerate(_groups(table))
        tasks += [(directory / f"{name}-{i:05d}.array_record", portion, numbers) for i, numbers in groups]
    write = functools.partial(_write_shard, config, saved, labels)
    written = workers.map(write, tasks, f"tokenising {corpus.name}")
    index: dict[str, object] = {"name": corpus.name}
    if kind == "text":
        index |= {"sequence_length": window_length(config), "token_type": writing.token_type(tokenizer.vocab_size)}
    else:
        index |= {"kind": form_of(config).rows, "token_type": packing.token_type(tokenizer, labels, kind)}
        index |= {"num_labels": labels.count, "labels": labels.names, "num_empty": _num_empty(corpus, parts)}
    for name in SPLITS:
        own = [shard for shard in written if shard.file.startswith(name)]
        if not sum(s.num_rows if isinstance(s, RowShard) else s.length - s.num_documents for s in own):
            problem = "has no text: change data.validation_tail"
            problem = problem if kind == "text" else f"has no example that is not longer than {packing.room(config)}"
            raise ConfigError(f"the {name} split of {corpus.name} {problem}")
        index[name] = [dataclasses.asdict(shard) for shard in own]
    write_atomically(directory / "index.json", json.dumps(index, indent=1) + "\n")


def _num_empty(corpus: Corpus, parts: Division) -> int:
    given = [corpus.held_out] if corpus.held_out else []
    total = sum(len(part.documents.records) for part in (corpus, *given))
    return total - sum(table.shape[1] for _, table in parts.values())


_load_once = functools.lru_cache(maxsize=1)(tokenizers.load_tokenizer)


def _write_shard(
    config: Config, saved: Path, labels: Labels, task: tuple[Path, Portion, np.ndarray]
) -> Shard | RowShard:
    """Tokenises the documents of a shard, each of running text as `bos` ids `eos`, unless that was done before.

    The first part of a document has no `eos`, for the document does not end there.
    """
    path, portion, numbers = task
    kind = Shard if form_of(config).kind == "text" else RowShard
    if path.exists():
        return kind(**shards.read_description(path))
    tokenizer = _load_once(saved)
    if kind is RowShard:
        return packing.write_rows(config, tokenizer, labels, path, portion, numbers)
    begin, end = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
    ids, num_bytes = [], 0
    for text in division.read(config, portion, numbers):
        ids.append(np.concatenate([begin, tokenizer.encode(text), end[: portion.part != "head"]]))
        num_bytes += len(text.encode())
    return writing.write_shard(path, ids, num_bytes, tokenizer.vocab_size, window_length(config))

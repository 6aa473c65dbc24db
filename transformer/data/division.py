"""Dividing the documents of a corpus into those for training and those held out."""

import functools
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from transformer.config import Config, ConfigError, write_atomically
from transformer.data import files, sources
from transformer.data.forms import form_of
from transformer.data.sources import Corpus, Documents
from transformer.data.workers import Workers

FORMAT = 1
"""Version of what lies in the cache; raise it whenever the same input gives other files."""


@dataclass(frozen=True)
class Portion:
    """What a split takes of its documents: the whole of each, or all before or after the place where each is cut."""

    documents: Documents
    part: Literal["whole", "head", "tail"] = "whole"


Division = dict[str, tuple[Portion, np.ndarray]]
"""For each split, its portion, and a table of number, bytes and hash of each document [3, documents]."""


def split_texts(config: Config, name: Literal["train", "validation"]) -> Iterator[str]:
    """Yields the texts of a split, source by source, in order: what a model is trained or measured on."""
    with Workers(config.data.num_workers, False) as workers:
        for corpus in sources.open_sources(config):
            portion, (numbers, *_) = divide(config, corpus, workers)[name]
            for document in read(config, portion, numbers):
                yield from form_of(config).texts(document)


def read(config: Config, portion: Portion, numbers: np.ndarray) -> Iterator[str]:
    """Yields what a portion takes of the documents with these numbers."""
    tail = 0.1 if config.data.validation_tail is None else config.data.validation_tail
    for number in numbers:
        text = portion.documents[number]
        end = int(len(text) * (1 - tail))
        if text := text if portion.part == "whole" else text[:end] if portion.part == "head" else text[end:]:
            yield text


def divide(config: Config, corpus: Corpus, workers: Workers) -> Division:
    """Divides the documents with text by their hash, unless what to hold out is given, or each of them is cut.

    A document's side depends on nothing but its own text, so adding documents moves none.
    """
    data, documents, cache_dir = config.data, corpus.documents, sources.cache_dir(config)
    table = _table(cache_dir, corpus, workers)
    if corpus.held_out is not None:
        held_out = _table(cache_dir, corpus.held_out, workers)
        return {"train": (Portion(documents), table), "validation": (Portion(corpus.held_out.documents), held_out)}
    is_text = form_of(config).kind == "text"
    if data.validation_tail is not None or (is_text and table.shape[1] == 1):
        return {"train": (Portion(documents, "head"), table), "validation": (Portion(documents, "tail"), table)}
    held_out = table[2] / 2.0**64 < data.validation_documents
    if held_out.all() or not held_out.any():
        advice = ", or set data.validation_tail = 0.1 to hold out the last part of each document" if is_text else ""
        raise ConfigError(
            f"data.validation_documents = {data.validation_documents}: {'all' if held_out.all() else 'none'} of the "
            f"{held_out.size} documents of {corpus.name} fall into the validation split; change it{advice}"
        )
    whole = Portion(documents)
    return {"train": (whole, table[:, ~held_out]), "validation": (whole, table[:, held_out])}


def _table(cache_dir: Path, corpus: Corpus, workers: Workers) -> np.ndarray:
    """Reads every document once (the result is kept) and returns the table of those with text."""
    path = cache_dir / "documents" / files.fingerprint(FORMAT, corpus.fingerprint) / "table.npy"
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
    return table


def _measure(documents: Documents, numbers: range) -> np.ndarray:
    table = np.empty((3, len(numbers)), np.uint64)
    for column, number in enumerate(numbers):
        data = documents[number].encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        table[:, column] = number, len(data), int.from_bytes(digest, "little")
    return table

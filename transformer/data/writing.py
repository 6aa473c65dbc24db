"""Shards written to disk, as `shards` reads them: by the processes that prepare data."""

import dataclasses
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from transformer.data.shards import Shard


def token_type(vocab_size: int) -> str:
    """Returns the NumPy type in which ids are stored."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def write_shard(path: Path, documents: Sequence[np.ndarray], num_bytes: int, vocab_size: int, length: int) -> Shard:
    """Writes the ids of documents, in records of `length`, whole or not at all: temporary name, fsync, rename."""
    sizes = np.array([len(document) for document in documents], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *documents]).astype(token_type(vocab_size))
    starts = np.cumsum(sizes) - sizes
    shard = Shard(path.name, len(documents), len(tokens), num_bytes)

    def records() -> Iterator[bytes]:
        for begin in range(0, len(tokens), length):
            here = starts[slice(*np.searchsorted(starts, (begin, begin + length)))] - begin
            yield np.array([len(here), *here], np.uint32).tobytes() + tokens[begin : begin + length].tobytes()

    write_records(path, records(), dataclasses.asdict(shard))
    return shard


def write_records(path: Path, records: Iterable[bytes], description: dict[str, Any]) -> None:
    """Writes records and what `shards.read_description` returns, whole or not at all: temporary name, fsync, rename."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")  # process numbers repeat on other machines
    writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1,uncompressed")
    for record in records:
        writer.write(record)
    writer.write(json.dumps(description).encode())
    writer.close()
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)

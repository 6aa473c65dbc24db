"""Shards of tokens on disk, ArrayRecord files, and the windows that are read from them."""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

Window = dict[str, np.ndarray]
"""`inputs`, `targets`, `positions`, `segment_ids` and `weights`, each [up to T]."""


@dataclass(frozen=True)
class Shard:
    """A file of consecutive documents, one after another: records of T tokens, and one that describes the others."""

    file: str
    num_documents: int
    length: int
    """Tokens, with the first and last of each document."""
    num_bytes: int
    """UTF-8 bytes of the text."""


@dataclass(frozen=True)
class Split:
    """The training or validation part of a source."""

    name: str
    directory: PurePath
    sequence_length: int
    token_type: str
    shards: tuple[Shard, ...]

    @functools.cached_property
    def first_windows(self) -> np.ndarray:
        """Number of each shard's first window, and at the end of all: every token but a shard's last is an input once."""
        return np.cumsum([0, *(-(-max(0, shard.length - 1) // self.sequence_length) for shard in self.shards)])

    @property
    def num_windows(self) -> int:
        return int(self.first_windows[-1])

    @property
    def num_tokens(self) -> int:
        """Targets that count: all tokens but the first of each document."""
        return sum(shard.length - shard.num_documents for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's text."""
        return sum(shard.num_bytes for shard in self.shards)

    def window(self, number: int, seed: int | None = None, epoch: int = 0) -> Window:
        """Returns a window; with a seed, the cuts of a shard lie elsewhere in every epoch.

        The inputs of a shard, all its tokens but the last, form a ring that is cut at some token into windows of T, the
        last one shorter: wherever the cut, the number of windows is the same and each target occurs once. Segments
        count the documents of the window from 1, positions count from 0 in each; a weight is 0 where the target
        belongs to another document than the input, otherwise 1.
        """
        length = self.sequence_length
        index = int(np.searchsorted(self.first_windows, number, side="right")) - 1
        shard, begin = self.shards[index], (number - int(self.first_windows[index])) * length
        cut = 0 if seed is None else pseudo_random(length, seed, epoch, self.directory.name, shard.file)
        ring = shard.length - 1
        column = np.arange(min(length, ring - begin))
        inputs = (cut + begin + column) % ring
        records = np.unique(np.concatenate([inputs, inputs + 1]) // length)
        tokens = np.zeros((len(records), length), np.int32)
        is_start = np.zeros((len(records), length), bool)
        for row, record in enumerate(reader(str(self.directory / shard.file)).read(records.tolist())):
            # The number of documents that begin in the record, where they do, and the tokens.
            (count,) = np.frombuffer(record, np.uint32, 1)
            ids = np.frombuffer(record, self.token_type, offset=4 + 4 * int(count))
            tokens[row, : len(ids)] = ids
            is_start[row, np.frombuffer(record, np.uint32, count, offset=4)] = True
        here, following = (
            np.searchsorted(records, place // length) * length + place % length for place in (inputs, inputs + 1)
        )
        begins = is_start.reshape(-1)[here]
        begins[0] = True
        return {
            "inputs": tokens.reshape(-1)[here],
            "targets": tokens.reshape(-1)[following],
            "positions": column - np.maximum.accumulate(np.where(begins, column, 0)),
            "segment_ids": np.cumsum(begins),
            "weights": ~is_start.reshape(-1)[following],
        }


def pseudo_random(below: int, *parts: object) -> int:
    """Returns a number in [0, below) that looks random but is a function of `parts`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") % below


def read_description(path: Path) -> dict[str, Any]:
    """Returns the description that `write_records` wrote after the records."""
    own = array_record_module.ArrayRecordReader(str(path))
    return json.loads(own.read([own.num_records() - 1])[0])


@functools.lru_cache(maxsize=512)  # open files, of which many systems allow a process 1,024
def reader(path: str) -> Any:
    """Returns the file, open for reading records by number."""
    return array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0")

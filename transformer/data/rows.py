"""Rows of several short examples, packed when the data is prepared, so that each row has a number of its own."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

import numpy as np

from transformer.data import shards
from transformer.data.shards import Window


@dataclass(frozen=True)
class RowShard:
    """A file of rows made of consecutive documents: a record for each, and one that describes the others."""

    file: str
    num_documents: int
    """Examples in the rows."""
    num_rows: int
    num_tokens: int
    """Targets that count."""
    num_bytes: int
    """UTF-8 bytes of the texts."""
    num_inputs: int
    """Tokens of the inputs, without padding."""
    num_too_long: int
    """Examples that fit into no row and were left out."""
    first_too_long: int | None
    """Number of the first of them among the documents of the corpus, from 0."""
    num_cut: int = 0
    """Conversations that end before their end, with the last answer that fits."""


@dataclass(frozen=True)
class RowSplit:
    """The training or validation part of a source of pairs or of texts with labels."""

    name: str
    directory: PurePath
    kind: Literal["pairs", "labelled", "numbers", "answers", "chat", "preferences"]
    token_type: str
    shards: tuple[RowShard, ...]

    @functools.cached_property
    def first_windows(self) -> np.ndarray:
        """Number of each shard's first row, and at the end of all."""
        return np.cumsum([0, *(shard.num_rows for shard in self.shards)])

    @property
    def num_windows(self) -> int:
        return int(self.first_windows[-1])

    @property
    def num_tokens(self) -> int:
        """Targets that count: tokens to write with their `eos`, or labels."""
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the split's texts."""
        return sum(shard.num_bytes for shard in self.shards)

    def window(self, number: int, seed: int | None = None, epoch: int = 0) -> Window:
        """Returns a row, which is the same in every epoch; the arrays of each side are as long as its tokens.

        Segments count the examples of the row from 1, positions count from 0 in each. Pairs have `encoder_inputs`,
        `encoder_positions`, `encoder_segment_ids`, and `inputs`, `targets`, `positions`, `segment_ids`, `weights`. Texts
        with labels have `inputs`, `positions`, `segment_ids` and `labels`: on every token the label of its text, or, where
        words have labels, that of a word on its first token and -1 elsewhere. Texts with a number have it in `labels` too.
        Questions have `passage`, the place where the passage begins, and `answers` [answers, 2], first and last token.
        Conversations have `inputs`, `targets`, `positions`, `segment_ids` and `weights`, which are 1 where the assistant says
        the target; of preferences two segments are the preferred conversation and the other.
        """
        index = int(np.searchsorted(self.first_windows, number, side="right")) - 1
        path = self.directory / self.shards[index].file
        (record,) = shards.reader(str(path)).read([number - int(self.first_windows[index])])
        (count,) = np.frombuffer(record, np.uint32, 1)
        sizes = np.frombuffer(record, np.uint32, 2 * int(count), offset=4).astype(np.int64)
        values = np.frombuffer(record, self.token_type, offset=4 + 8 * int(count)).astype(np.int32)
        parts = np.split(values, np.cumsum(sizes)[:-1])
        firsts, seconds = parts[::2], parts[1::2]
        if self.kind == "pairs":
            encoder = {f"encoder_{name}": array for name, array in _joined(firsts).items()}
            decoder = _joined([target[:-1] for target in seconds])
            targets = np.concatenate([target[1:] for target in seconds])
            return encoder | decoder | {"targets": targets, "weights": np.ones(len(targets), np.float32)}
        if self.kind in ("chat", "preferences"):
            marked = firsts if self.kind == "chat" else parts
            following = np.concatenate([tokens[1:] for tokens in marked])
            learned = {"targets": following >> 1, "weights": (following & 1).astype(np.float32)}
            return _joined([tokens[:-1] >> 1 for tokens in marked]) | learned
        if self.kind == "answers":
            return _joined(firsts) | {"passage": seconds[0][:1], "answers": seconds[0][1:].reshape(-1, 2)}
        of_numbers = self.kind == "numbers"
        labels = [part.astype(np.uint16).view(np.float32) if of_numbers else part - 1 for part in seconds]
        each = [np.broadcast_to(label, len(ids)) for ids, label in zip(firsts, labels, strict=True)]
        return _joined(firsts) | {"labels": np.concatenate(each)}


def splits(directory: PurePath, index: Mapping[str, Any], names: Sequence[str]) -> list[RowSplit]:
    """Returns the splits of which `index` is the description in `directory`."""
    shards_of = {name: tuple(RowShard(**shard) for shard in index[name]) for name in names}
    return [RowSplit(name, directory, index["kind"], index["token_type"], shards_of[name]) for name in names]


def _joined(parts: Sequence[np.ndarray]) -> Window:
    sizes = [len(part) for part in parts]
    return {
        "inputs": np.concatenate(parts),
        "positions": np.concatenate([np.arange(size) for size in sizes]),
        "segment_ids": np.repeat(np.arange(1, len(parts) + 1), sizes),
    }

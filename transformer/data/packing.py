"""From pairs and labelled texts to rows of several examples, each shard of them by itself."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from transformer.config import Config, ConfigError, data_kind, source_length
from transformer.data import division, writing
from transformer.data.division import Portion
from transformer.data.forms import Form, Label, form_of
from transformer.data.rows import RowShard
from transformer.data.shards import pseudo_random
from transformer.data.sources import Corpus, Documents
from transformer.data.tokenizers import Tokenizer
from transformer.data.workers import Workers

MAX_OPEN_ROWS = 512
"""Rows with room that packing keeps in view."""


@dataclass(frozen=True)
class Labels:
    """The classes of labelled texts."""

    count: int = 0
    names: tuple[str, ...] = ()
    """In the order of their numbers; none where labels are numbers."""

    @functools.cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


def capacity(config: Config) -> tuple[int, int]:
    """Returns how much of each of the two arrays of its examples a row has room for."""
    length = config.data.sequence_length
    return (source_length(config) if data_kind(config) == "pairs" else length), length


def collect_labels(config: Config, sources: Sequence[Corpus], workers: Workers) -> Labels:
    """Returns the classes in the documents of sources: names sorted, or numbers as they are, with the names that the
    source has for them.

    Raises ConfigError for names beside numbers, for labels that occur in validation alone, and for sources whose names
    differ.
    """
    form = form_of(config)
    if form.target in ("number", "answers"):
        # What a head gives for each token: a number, or scores of begin and end.
        return Labels(1 if form.target == "number" else 2)
    found: dict[str, set[Label]] = {"train": set(), "validation": set()}
    for source in sources:
        for split, (portion, (numbers, *_)) in division.divide(config, source, workers).items():
            tasks = np.array_split(numbers, -(-len(numbers) // 10_000))
            task = functools.partial(_labels, form, portion.documents)
            found[split].update(*workers.map(task, tasks, f"collecting the labels of {source.name}, {split}"))
    everything = found["train"] | found["validation"]
    names = sorted(label for label in everything if isinstance(label, str))
    field = f"data.label_field = {config.data.label_field!r}"
    if names and len(names) < len(everything):
        number = min(label for label in everything if isinstance(label, int))
        raise ConfigError(f"{field}: labels are all names or all numbers, and there are {names[0]!r} and {number}")
    if unknown := sorted(everything - found["train"], key=str):
        raise ConfigError(f"{field}: the label {unknown[0]!r} occurs in the validation split alone")
    if names:
        return Labels(len(names), tuple(names))
    count = 1 + max(int(label) for label in everything)
    known = {source.label_names for source in sources if len(source.label_names) >= count}
    if len(known) > 1:
        several = " and ".join(map(str, sorted(known)[:2]))
        raise ConfigError(f"{field}: the sources number their labels differently, {several}")
    return Labels(len(next(iter(known))), next(iter(known))) if known else Labels(count)


def _labels(form: Form, documents: Documents, numbers: np.ndarray) -> set[Label]:
    return {label for number in numbers for label in form.labels(documents[number])}


def write_rows(
    config: Config, tokenizer: Tokenizer, labels: Labels, path: Path, portion: Portion, numbers: np.ndarray
) -> RowShard:
    """Packs the documents with these numbers and writes the rows.

    The documents come in an order that looks random and depends on their numbers alone, so that the neighbours of an
    example in its row are not those in the corpus.
    """
    form, limits = form_of(config), capacity(config)
    examples, sizes, num_bytes, too_long, num_cut = [], [], 0, [], 0
    for number in sorted(numbers.tolist(), key=lambda number: pseudo_random(2**63, number)):
        document = portion.documents[number]
        first, second = form.encode(document, tokenizer, labels.numbers)
        if form.kind == "chat":
            assert form.chat is not None
            whole, first = len(first), form.chat.fitted(first, limits[0] + 1)
            num_cut += 0 < len(first) < whole
        size = _size(form.kind, first, second)
        if size[0] > limits[0] or size[1] > limits[1] or size[0] <= 0:
            too_long.append(number)
            continue
        examples.append((first, second))
        sizes.append(size)
        num_bytes += sum(len(text.encode()) for text in form.texts(document))
    # A question has a row of its own: which token is asked for is a choice among all of the row.
    alone = [[number] for number in range(len(examples))]
    rows = alone if form.target == "answers" else pack(np.array(sizes, np.int64).reshape(-1, 2), limits)
    kind = token_type(tokenizer, labels, form.kind)
    records = (_record([array for i in row for array in examples[i]], kind) for row in rows)
    shard = RowShard(
        file=path.name,
        num_documents=len(examples),
        num_rows=len(rows),
        num_tokens=sum(_num_targets(form.rows, *example) for example in examples),
        num_bytes=num_bytes,
        num_inputs=sum(sum(size) if form.kind == "pairs" else size[0] for size in sizes),
        num_too_long=len(too_long),
        first_too_long=min(too_long, default=None),
        num_cut=num_cut,
    )
    writing.write_records(path, records, dataclasses.asdict(shard))
    return shard


def _size(kind: str, first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Returns how much room the two arrays of an example take: a decoder reads all tokens but the last of what it writes."""
    if kind == "preferences":
        return len(first) + len(second) - 2, 0
    return len(first) - (kind == "chat"), len(second) - (kind == "pairs")


def _num_targets(kind: str, first: np.ndarray, second: np.ndarray) -> int:
    if kind in ("chat", "preferences"):
        return int(np.sum(first[1:] & 1) + np.sum(second[1:] & 1))
    if kind in ("numbers", "answers"):
        return 1
    return len(second) - 1 if kind == "pairs" else int(np.count_nonzero(second))


def token_type(tokenizer: Tokenizer, labels: Labels, kind: str = "labelled") -> str:
    """Returns the NumPy type in which ids, labels plus 1, and marked tokens are stored."""
    if kind in ("chat", "preferences"):
        return writing.token_type(2 * tokenizer.vocab_size)
    return writing.token_type(max(tokenizer.vocab_size, labels.count + 1))


def left_out(config: Config, directory: Path) -> list[str]:
    """Returns a sentence for each kind of example that did not make it into the rows in `directory`."""
    index = json.loads((directory / "index.json").read_text())
    messages = []
    if index["num_empty"]:
        messages.append(f"{index['num_empty']:,} examples of {index['name']} have an empty text: they are left out")
    for split in ("train", "validation"):
        found = [RowShard(**shard) for shard in index[split]]
        count = sum(shard.num_too_long for shard in found)
        if cut := sum(shard.num_cut for shard in found):
            messages.append(
                f"{cut:,} {split} examples of {index['name']} are longer than {room(config)}: they end with the last answer "
                "that fits (data.overlong_chats)"
            )
        first = min((s.first_too_long for s in found if s.first_too_long is not None), default=0)
        if count:
            messages.append(
                f"{count:,} of {count + sum(shard.num_documents for shard in found):,} {split} examples of "
                f"{index['name']} are longer than {room(config)}: they are left out, number {first + 1:,} as the first"
            )
    return messages


def room(config: Config) -> str:
    """Returns the keys that say how long an example may be, in words."""
    own = f"data.sequence_length = {config.data.sequence_length}"
    return f"data.source_length = {source_length(config)} or {own}" if data_kind(config) == "pairs" else own


def pack(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Returns the examples of each row, given the sizes of both arrays of each example [examples, 2], none too large.

    Best fit: each example in turn goes into the row where it leaves the least room, or else begins a row. The sum of
    both rooms counts, each as a share of its `capacity`. In contrast to sorting by size first, it leaves it to the order
    of the examples which of them come together, at the cost of a little more padding.
    """
    rows: list[list[int]] = []
    limits = np.array(capacity, np.int64)
    share = np.prod(limits) // limits
    room = np.zeros((MAX_OPEN_ROWS, 2), np.int64)
    number_of = np.zeros(MAX_OPEN_ROWS, np.int64)
    num_open = 0
    for example, size in enumerate(sizes.astype(np.int64)):
        left = room[:num_open] - size
        fits = np.flatnonzero((left >= 0).all(axis=1))
        if len(fits):
            place = int(fits[np.argmin(left[fits] @ share)])
        else:
            # Where all places are taken, the fullest row is closed.
            place = num_open if num_open < MAX_OPEN_ROWS else int(np.argmin(room @ share))
            num_open = min(num_open + 1, MAX_OPEN_ROWS)
            room[place], number_of[place] = limits, len(rows)
            rows.append([])
        room[place] -= size
        rows[number_of[place]].append(example)
    return rows


def _record(arrays: Sequence[np.ndarray], kind: str) -> bytes:
    """The number of examples, the lengths of both arrays of each, and the arrays."""
    header = np.array([len(arrays) // 2, *map(len, arrays)], np.uint32)
    return header.tobytes() + np.concatenate(arrays).astype(kind).tobytes()

"""Batches as a pure function of (seed, step): the same whatever the number of processes, and after any resume.

Grain chooses: shuffling, repetition and mixture are random-access maps from the number of an example to its window.
Grain imports JAX, so it is imported where it is used, after the allocator and the devices are set up.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from transformer.config import Config, first_example, num_microbatches
from transformer.data.prepared import Prepared, Source
from transformer.data.shards import Window, pseudo_random

Batch = dict[str, np.ndarray]
"""`inputs`, `targets`, `positions`, `segment_ids` (int32) and `weights` (float32), each [rows, T], or what else the
objective's rows have; padding has segment 0 and weight 0.
"""


def train_batch(config: Config, prepared: Prepared, step: int, rows: Sequence[int] | None = None) -> Batch:
    """Returns the given rows (all, if None) of the global batch of a step, counted from 0.

    Microbatch m of M has rows m, m + M, ...; those of microbatches that the step does not have yet are padding.
    """
    data, parts = config.data, config.train.num_microbatches
    first, used = first_example(config, step), num_microbatches(config, step)
    weights = data.weights or tuple(float(source.train.num_tokens) for source in prepared.sources)
    choices = _choices(prepared.sources, weights, data.shuffle, config.seed)
    made: list[Window] = []
    for row in range(config.train.batch_size) if rows is None else rows:
        if row % parts >= used:
            made.append({})
            continue
        example = first + row // parts * used + row % parts
        source, number, epoch = choices[example]
        cut = config.seed if data.shift_windows and epoch else None
        window = prepared.sources[source].train.window(number, cut, epoch)
        made.append(_make(prepared, window, config.seed, example))
    return _batch(config, prepared, made)


def train_batches(config: Config, prepared: Prepared, start_step: int, rows: Sequence[int]) -> Iterator[Batch]:
    """Yields the given rows of the batches of steps `start_step` to `train.num_steps` - 1, read ahead by threads."""
    read = functools.partial(train_batch, config, prepared, rows=tuple(rows))
    return _read_ahead(config, range(start_step, config.train.num_steps), read)


def validation_batches(config: Config, prepared: Prepared, rows: Sequence[int]) -> Iterator[Batch]:
    """Yields the given rows of the batches of the validation splits, source by source, in order, each window once.

    The last batch is filled up with rows of padding. `evaluation.num_batches` ends it earlier.
    """
    read = functools.partial(_validation_batch, config, prepared, tuple(rows))
    return _read_ahead(config, range(num_validation_batches(config, prepared)), read)


def num_validation_batches(config: Config, prepared: Prepared) -> int:
    """Returns how many batches `validation_batches` yields."""
    windows = sum(source.validation.num_windows for source in prepared.sources)
    return min(-(-windows // _validation_size(config)), config.evaluation.num_batches or windows)


def _validation_size(config: Config) -> int:
    return config.evaluation.batch_size or config.train.batch_size


def _validation_batch(config: Config, prepared: Prepared, rows: Sequence[int], number: int) -> Batch:
    splits = [source.validation for source in prepared.sources]
    first = np.cumsum([0, *(split.num_windows for split in splits)])
    made: list[Window] = []
    for row in rows:
        window = number * _validation_size(config) + row
        source = int(np.searchsorted(first, window, side="right")) - 1
        if source < len(splits):
            # The same examples whatever the run's seed, so that losses can be compared.
            made.append(_make(prepared, splits[source].window(window - int(first[source])), "validation", window))
        else:
            made.append({})
    return _batch(config, prepared, made)


def _make(prepared: Prepared, window: Window, *place: object) -> Window:
    """Returns the row that a window becomes; what is random about it depends on its place alone."""
    if prepared.maker is None:
        return window
    return prepared.maker(window, np.random.Generator(np.random.Philox(pseudo_random(2**63, *place))))


def _batch(config: Config, prepared: Prepared, made: Sequence[Window]) -> Batch:
    """Stacks rows, each array padded at its end."""
    arrays = prepared.maker.arrays if prepared.maker else token_arrays(config.data.sequence_length)
    batch = {name: np.zeros((len(made), length), dtype) for name, (length, dtype) in arrays.items()}
    for number, row in enumerate(made):
        for name, values in row.items():
            batch[name][number, : len(values)] = values
    return batch


def token_arrays(length: int) -> dict[str, tuple[int, str]]:
    """Returns length and NumPy type of the arrays of windows of text."""
    tokens = {name: (length, "int32") for name in ("inputs", "targets", "positions", "segment_ids")}
    return tokens | {"weights": (length, "float32")}


def _read_ahead(config: Config, numbers: range, read: Callable[[int], Batch]) -> Iterator[Batch]:
    import grain

    options = grain.ReadOptions(min(config.data.prefetch_batches, 16), config.data.prefetch_batches)
    wanted: Any = grain.MapDataset.range(numbers.start, numbers.stop)
    return iter(wanted.map(read).to_iter_dataset(options)) if numbers else iter(())


@functools.lru_cache(maxsize=8)
def _choices(sources: tuple[Source, ...], weights: tuple[float, ...], shuffle: bool, seed: int) -> Any:
    """Returns a Grain dataset that maps the number of an example to (source, window, epoch of that source)."""
    import grain

    parts: list[Any] = []
    for number, source in enumerate(sources):
        windows = source.train.num_windows
        # Mapped before it is shuffled, so that the index still tells the epoch.
        part: Any = grain.MapDataset.range(windows).map_with_index(functools.partial(_choice, number, windows))
        if shuffle:
            part = part.shuffle(seed=pseudo_random(2**32, seed, number, source.name))
        parts.append(part.repeat())
    mixture: Any = Mixture(weights)
    return parts[0] if len(parts) == 1 else grain.MapDataset.select_from_datasets(parts, mixture)


def _choice(source: int, windows: int, k: int, window: int) -> tuple[int, int, int]:
    return source, int(window), k // windows


class Mixture:
    """Interleaves sources so that among the first k examples each has its share of k, to within a few examples.

    Grain's own `mix` rounds weights down to multiples of a hundredth of the smallest.
    """

    def __init__(self, weights: Sequence[float]):
        self.shares = tuple(max(1, round(2**40 * weight / sum(weights))) for weight in weights)

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, k: int) -> tuple[int, int]:
        """Returns the source of example k and how many of that source's examples come before."""
        # Each source in turn takes its share, evenly spaced, of the places that those before it left.
        left = sum(self.shares)
        for source, share in enumerate(self.shares):
            others, others_after = k * (left - share) // left, (k + 1) * (left - share) // left
            if others == others_after:
                return source, k - others
            left, k = left - share, others
        raise AssertionError("the last source takes every place that is left")

"""Batches are a function of (seed, step); an epoch has every target once, in an order without correlation."""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from transformer.config import Config, replace
from transformer.data.batches import (
    Batch,
    Mixture,
    _choices,
    num_validation_batches,
    train_batch,
    train_batches,
    validation_batches,
)
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(make_config: MakeConfig, random_text: Callable[[int, int], str]) -> Config:
    return make_config([random_text(seed, 1 + seed * 7 % 50) for seed in range(120)])


@pytest.fixture
def prepared(config: Config) -> Prepared:
    return prepare(config, False)


def digest(batches: Sequence[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(name.encode() + batch[name].tobytes() + str(batch[name].dtype).encode())
    return found.hexdigest()


def joined(parts: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_batch_is_the_same_for_any_number_of_processes_and_after_a_resume(
    config: Config, prepared: Prepared, num_processes: int
) -> None:
    config = replace(config, train={"num_steps": 40})
    whole = [train_batch(config, prepared, step) for step in range(40)]
    size = 4 // num_processes
    rows = [range(i * size, (i + 1) * size) for i in range(num_processes)]
    for start in (0, 17, 39):
        parts = [list(train_batches(config, prepared, start, part)) for part in rows]
        assert {len(part) for part in parts} == {40 - start}
        assert digest([joined(batch) for batch in zip(*parts, strict=True)]) == digest(whole[start:])
    assert list(train_batches(config, prepared, 40, range(4))) == []
    again = prepare(config, False)
    assert digest([train_batch(config, again, 31, [3, 0])]) == digest([{k: v[[3, 0]] for k, v in whole[31].items()}])


@pytest.mark.parametrize("warmup", [1, 3, 7])
def test_a_batch_that_grows_has_every_example_once(config: Config, prepared: Prepared, warmup: int) -> None:
    """In their order, in the first rows of the microbatches that there are; the others are padding."""
    config = replace(config, data={"shuffle": False})
    growing = replace(config, train={"batch_size": 8, "num_microbatches": 4, "batch_warmup_steps": warmup})
    plain = replace(config, train={"batch_size": 1})
    counts, seen = [], 0
    for step in range(10):
        batch = train_batch(growing, prepared, step)
        used = [row for row in range(8) if batch["segment_ids"][row].any()]
        parts = len(used) // 2
        assert used == [row for row in range(8) if row % 4 < parts]
        assert not any(values[row].any() for values in batch.values() for row in range(8) if row not in used)
        examples = [train_batch(plain, prepared, seen + number) for number in range(len(used))]
        assert digest([{name: values[used] for name, values in batch.items()}]) == digest([joined(examples)])
        assert digest([train_batch(growing, prepared, step, [5, 1])]) == digest(
            [{name: values[[5, 1]] for name, values in batch.items()}]
        )
        counts.append(parts)
        seen += len(used)
    # A line from one part at the first step to all of them after the warm-up.
    assert counts == [min(4, 1 + 3 * step // warmup) for step in range(10)]
    later = list(train_batches(replace(growing, train={"num_steps": 10}), prepared, 8, range(8)))
    assert digest(later) == digest([train_batch(growing, prepared, step) for step in (8, 9)])


def test_shapes_and_types(config: Config, prepared: Prepared) -> None:
    batch = train_batch(config, prepared, 3, [1, 2])
    kinds = {name: (values.dtype.name, values.shape) for name, values in batch.items()}
    integers = dict.fromkeys(("inputs", "targets", "positions", "segment_ids"), ("int32", (2, 16)))
    assert kinds == integers | {"weights": ("float32", (2, 16))}


def test_seed_and_step_matter(config: Config, prepared: Prepared) -> None:
    batches = [train_batch(replace(config, seed=seed), prepared, step) for seed in range(3) for step in range(3)]
    assert len({digest([batch]) for batch in batches}) == 9


def pairs(batches: Sequence[Batch]) -> list[tuple[int, int]]:
    found = []
    for batch in batches:
        counts = batch["weights"] > 0
        found += zip(batch["inputs"][counts].tolist(), batch["targets"][counts].tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_every_epoch_has_every_target_once(config: Config, prepared: Prepared, shuffle: bool, shift: bool) -> None:
    config = replace(config, data={"shuffle": shuffle, "shift_windows": shift}, train={"batch_size": 1})
    split = prepared.sources[0].train
    epochs = []
    for epoch in range(3):
        steps = range(epoch * split.num_windows, (epoch + 1) * split.num_windows)
        batches = [train_batch(config, prepared, step) for step in steps]
        assert sum(float(batch["weights"].sum()) for batch in batches) == split.num_tokens
        epochs.append((pairs(batches), [batch["inputs"].tobytes() for batch in batches]))
    assert epochs[0][0] == epochs[1][0] == epochs[2][0]
    assert (epochs[0][1] == epochs[1][1]) == (not shuffle and not shift)
    assert (set(epochs[1][1]) == set(epochs[2][1])) == (not shift)


def test_without_shuffling_the_first_epoch_is_in_order(config: Config, prepared: Prepared) -> None:
    config = replace(config, data={"shuffle": False})
    split = prepared.sources[0].train
    for row in range(4):
        assert train_batch(config, prepared, 2)["inputs"][row].tolist() == split.window(8 + row)["inputs"].tolist()


def test_the_shuffle_shows_no_serial_correlation(config: Config, prepared: Prepared) -> None:
    """Statistics of a random permutation of N: lag-l autocorrelation has standard deviation 1/sqrt(N), the number of
    neighbours i, i+1 that stay neighbours is Poisson with mean 1, the displacement has mean N/3 and standard deviation
    of the mean below 0.24 sqrt(N); consecutive epochs are uncorrelated. All within four standard deviations.
    """
    split = prepared.sources[0].train
    for seed in range(4):
        choices = _choices(prepared.sources, (1.0,), True, seed)
        size = split.num_windows
        orders = [np.array([choices[k][1] for k in range(e * size, (e + 1) * size)]) for e in range(3)]
        for epoch, order in enumerate(orders):
            assert sorted(order) == list(range(size)), "not a permutation"
            assert {choices[k][2] for k in range(epoch * size, (epoch + 1) * size)} == {epoch}
            centred = (order - order.mean()) / order.std()
            for lag in (1, 2, 3, 4, 8):
                correlation = float(np.mean(centred[:-lag] * centred[lag:]))
                assert abs(correlation) < 4 / np.sqrt(size), (seed, epoch, lag)
            assert np.sum(np.diff(order) == 1) <= 1 + 4
            displacement = np.abs(order - np.arange(size)).mean()
            assert abs(displacement - size / 3) < 4 * 0.24 * np.sqrt(size)
        for first, second in itertools.combinations(orders, 2):
            assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(size)
    assert size > 500, "too few windows for the statistics to mean anything"


@pytest.mark.parametrize("batch_size", [1, 3, 4, 1000])
def test_validation_has_every_target_once_whatever_the_batch(
    config: Config, prepared: Prepared, batch_size: int
) -> None:
    config = replace(config, evaluation={"batch_size": batch_size})
    split = prepared.sources[0].validation
    batches = list(validation_batches(config, prepared, range(batch_size)))
    assert len(batches) == num_validation_batches(config, prepared) == -(-split.num_windows // batch_size)
    assert sum(float(batch["weights"].sum()) for batch in batches) == split.num_tokens
    rows = np.concatenate([batch["inputs"] for batch in batches])
    for number in range(split.num_windows):
        window = split.window(number)["inputs"]
        assert rows[number, : len(window)].tolist() == window.tolist()
    assert not np.concatenate([batch["segment_ids"] for batch in batches])[split.num_windows :].any()
    parts = [list(validation_batches(config, prepared, [row])) for row in range(min(batch_size, 4))]
    if batch_size <= 4:
        assert digest([joined(batch) for batch in zip(*parts, strict=True)]) == digest(batches)


def test_validation_may_be_cut_short(config: Config, prepared: Prepared) -> None:
    whole = list(validation_batches(config, prepared, range(4)))
    short = replace(config, evaluation={"num_batches": 2})
    assert num_validation_batches(short, prepared) == 2
    assert digest(list(validation_batches(short, prepared, range(4)))) == digest(whole[:2])
    assert num_validation_batches(replace(config, evaluation={"num_batches": 9999}), prepared) == len(whole)


def test_padding_counts_for_nothing(config: Config, prepared: Prepared) -> None:
    batches = [*validation_batches(config, prepared, range(4))]
    batches += [train_batch(config, prepared, step) for step in range(prepared.sources[0].train.num_windows // 4 + 1)]
    padded = 0
    for batch in batches:
        padding = batch["segment_ids"] == 0
        padded += int(padding.sum())
        assert all(not batch[name][padding].any() for name in ("inputs", "targets", "positions", "weights"))
        assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding comes last"
    assert padded


@pytest.fixture
def two_sources(make_config: MakeConfig, tmp_path: Path) -> Config:
    for name, letter, size in (("small", "s", 900), ("large", "L", 2700)):
        (tmp_path / f"{name}.txt").write_text(letter * size)
    return make_config(source=tuple(f"local_text:{tmp_path}/{name}.txt" for name in ("small", "large")))


@pytest.mark.parametrize(
    ("weights", "expected"), [((), 0.25), ((1.0, 1.0), 0.5), ((0.7, 0.3), 0.7), ((2.0, 14.0), 0.125)]
)
def test_sources_are_mixed_by_weight(two_sources: Config, weights: tuple[float, ...], expected: float) -> None:
    config = replace(two_sources, data={"weights": weights}, train={"num_steps": 200})
    prepared = prepare(config, False)
    small = 0
    for step, batch in enumerate(train_batches(config, prepared, 0, range(4)), start=1):
        letters = [chr(int(row.max()) - 4) for row in batch["inputs"]]
        assert set(letters) <= {"s", "L"}
        small += letters.count("s")
        assert abs(small - expected * 4 * step) <= 1, "the share holds after every step"
    assert small == pytest.approx(expected * 800, abs=1)
    whole = [train_batch(config, prepared, step) for step in (150, 199)]
    part = list(train_batches(config, prepared, 150, [1, 2]))
    assert digest([part[0], part[-1]]) == digest([{k: v[1:3] for k, v in batch.items()} for batch in whole])


def test_each_source_of_a_mixture_goes_through_its_epochs(two_sources: Config) -> None:
    config = replace(two_sources, data={"weights": (1.0, 1.0)})
    prepared = prepare(config, False)
    choices = _choices(prepared.sources, config.data.weights, True, 0)
    found = [choices[k] for k in range(1000)]
    for number, source in enumerate(prepared.sources):
        windows = source.train.num_windows
        own = [choice[1:] for choice in found if choice[0] == number]
        for epoch in range(len(own) // windows):
            part = own[epoch * windows : (epoch + 1) * windows]
            assert sorted(part) == [(window, epoch) for window in range(windows)]


def test_validation_goes_through_the_sources_in_order(two_sources: Config) -> None:
    prepared = prepare(two_sources, False)
    rows = np.concatenate([batch["inputs"] for batch in validation_batches(two_sources, prepared, range(4))])
    letters = [chr(int(row.max()) - 4) for row in rows if row.any()]
    counts = [source.validation.num_windows for source in prepared.sources]
    assert letters == ["s"] * counts[0] + ["L"] * counts[1]


@pytest.mark.parametrize("weights", [(1.0,), (1.0, 2.0, 3.0), (0.1, 0.7, 0.2), (1e-3, 1.0), (5.0, 1e6, 3.0, 7.0)])
def test_a_mixture_numbers_each_source_without_gaps(weights: tuple[float, ...]) -> None:
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for k in range(3000):
        source, index = mixture[k]
        assert index == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            assert abs(count - weight / sum(weights) * (k + 1)) <= len(weights)
    far = [mixture[10**12 + i] for i in range(1000)]
    assert abs(far[-1][1] / (10**12) - weights[far[-1][0]] / sum(weights)) < 1e-9


def test_a_step_far_away_needs_no_walk(config: Config, prepared: Prepared) -> None:
    step = 10**9
    config = replace(config, train={"num_steps": step + 3})
    assert digest(list(train_batches(config, prepared, step, range(4)))) == digest(
        [train_batch(config, prepared, step + i) for i in range(3)]
    )

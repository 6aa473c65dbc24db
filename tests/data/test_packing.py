"""Packing: rows that are full, in an order that is random, and the same whatever else happens."""

from collections.abc import Sequence

import numpy as np
import pytest

from transformer.data import packing
from transformer.data.packing import pack


def best_fit(sizes: np.ndarray, capacity: Sequence[int]) -> list[list[int]]:
    """Best fit with exact fractions and every row in view."""
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for example, (first, second) in enumerate(sizes.tolist()):
        best = None
        for row, (a, b) in enumerate(room):
            left = (a - first) * capacity[1] + (b - second) * capacity[0]
            if a >= first and b >= second and (best is None or left < best[0]):
                best = left, row
        if best is None:
            rows.append([])
            room.append(list(capacity))
        row = len(rows) - 1 if best is None else best[1]
        rows[row].append(example)
        room[row][0] -= first
        room[row][1] -= second
    return rows


@pytest.mark.parametrize("capacity", [(64, 64), (32, 96), (100, 37)])
def test_rows_are_those_of_a_plain_best_fit(capacity: tuple[int, int]) -> None:
    generator = np.random.default_rng(capacity)
    sizes = 1 + generator.integers(0, np.array(capacity) // 2, (400, 2))
    rows = pack(sizes, capacity)
    assert rows == best_fit(sizes, capacity)
    assert sorted(example for row in rows for example in row) == list(range(400))


def test_with_few_rows_in_view_none_is_too_full(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = np.random.default_rng(0).integers(1, 40, (1000, 2))
    sizes[::50] = (64, 64)
    many = len(pack(sizes, (64, 64)))
    monkeypatch.setattr(packing, "MAX_OPEN_ROWS", 3)
    rows = pack(sizes, (64, 64))
    assert sorted(example for row in rows for example in row) == list(range(1000))
    assert all((sizes[row].sum(axis=0) <= 64).all() for row in rows)
    assert many < len(rows) < 1.3 * many


def test_little_is_padding() -> None:
    """Sentences of about fifteen tokens in rows of 128 leave less than a twentieth empty."""
    generator = np.random.default_rng(1)
    source = np.clip(generator.lognormal(2.7, 0.35, 8000), 3, 60).astype(int)
    target = np.clip(source + generator.normal(0, 2, 8000), 3, 60).astype(int)
    rows = pack(np.stack([source, target], axis=1), (128, 128))
    assert len(rows) < 1.05 * max(source.sum(), target.sum()) / 128


def test_nothing_makes_no_rows() -> None:
    assert pack(np.zeros((0, 2), np.int64), (8, 8)) == []

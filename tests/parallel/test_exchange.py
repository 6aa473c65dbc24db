"""Rows that travel between devices: none is lost, however unevenly they are sent."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from transformer.parallel.exchange import send, send_back

SIZE, ROWS, WIDTH = 4, 12, 3

COUNTS = {
    "evenly": np.full((SIZE, SIZE), 3),
    "all to one": np.repeat(np.array([[0, 0, ROWS, 0]]), SIZE, axis=0),
    "all away": np.roll(np.eye(SIZE, dtype=int), 1, axis=1) * ROWS,
    "few": np.array([[0, 1, 2, 3], [4, 0, 0, 0], [0, 0, 0, 0], [5, 6, 0, 1]]),
}


def over_devices(function: Any, outputs: int) -> Any:
    mesh = jax.make_mesh((SIZE, 2), ("there", "here"), (AxisType.Auto,) * 2)
    layout = PartitionSpec("there")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=layout, out_specs=(layout,) * outputs, check_vma=False)
    return jax.jit(mapped)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_rows_arrive_in_order_and_come_back(counts: np.ndarray) -> None:
    rows = np.random.default_rng(0).normal(size=(SIZE, ROWS, WIDTH)).astype(np.float32)

    def there_and_back(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        received: Any = send(rows[0], jnp.asarray(counts), "there")
        back: Any = send_back(received, jnp.asarray(counts), "there")
        return received[None], back[None]

    received, back = over_devices(there_and_back, 2)(rows)
    expected, returned = np.zeros((SIZE, SIZE, ROWS, WIDTH)), np.zeros((SIZE, ROWS, WIDTH))
    for sender in range(SIZE):
        starts = np.cumsum(counts[sender]) - counts[sender]
        for receiver, (start, count) in enumerate(zip(starts, counts[sender], strict=True)):
            expected[receiver, sender, :count] = rows[sender, start : start + count]
        total = counts[sender].sum()
        returned[sender, :total] = rows[sender, :total]
    np.testing.assert_array_equal(received, expected.astype(np.float32))
    np.testing.assert_array_equal(back, returned.astype(np.float32))


@pytest.mark.parametrize("counts", [COUNTS["few"]], ids=["few"])
def test_each_way_is_the_other_ones_gradient(counts: np.ndarray) -> None:
    """<send(x), y> = <x, send_back(y)> of all devices together, and that is what differentiation gives."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SIZE, ROWS, WIDTH)).astype(np.float32)
    y = rng.normal(size=(SIZE, SIZE, ROWS, WIDTH)).astype(np.float32)
    numbers, away = jnp.asarray(counts), partial(send, counts=jnp.asarray(counts), axis="there")

    def both(x: jax.Array, y: jax.Array) -> tuple[jax.Array, ...]:
        sent, of_x = jax.vjp(away, x[0])
        back, of_y = jax.vjp(partial(send_back, counts=numbers, axis="there"), y[0])
        return sent[None], of_x(y[0])[0][None], back[None], of_y(x[0])[0][None]

    sent, of_x, back, of_y = over_devices(both, 4)(x, y)
    np.testing.assert_array_equal(of_x, back)
    np.testing.assert_array_equal(of_y, sent)
    assert np.vdot(sent, y) == pytest.approx(np.vdot(x, back), rel=1e-5)

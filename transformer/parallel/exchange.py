"""Rows that travel between the devices of a mesh axis, in numbers that are known to the devices alone, and back.

Each device may send any of its rows anywhere, even all of them to one other, and none is ever dropped: there is room for
M rows from each of n devices. On a TPU only rows that there are travel; elsewhere all the room does, for XLA's CPU
backend has no such collective. Inside `jax.shard_map`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Axis = str | tuple[str, ...]


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Float[Array, "M D"], counts: Int[Array, "n n"], axis: Axis) -> Float[Array, "n M D"]:
    """Returns the rows that each device has sent here, in their order, zeros after them.

    `counts[i, j]` rows go from device i to device j; those for the first device lie first.
    """
    return _by_platform(_send_ragged, _send_padded, axis)(rows, counts)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send_back(received: Float[Array, "n M D"], counts: Int[Array, "n n"], axis: Axis) -> Float[Array, "M D"]:
    """Returns the rows that were sent from here to where they had been: the inverse of `send`, and its transpose."""
    return _by_platform(_back_ragged, _back_padded, axis)(received, counts)


def _by_platform(ragged: Callable[..., Array], padded: Callable[..., Array], axis: Axis) -> Callable[..., Array]:
    return lambda *given: jax.lax.platform_dependent(
        *given, tpu=partial(ragged, axis=axis), default=partial(padded, axis=axis)
    )


def _starts(counts: Int[Array, "n n"]) -> Int[Array, "n n"]:
    """Returns where on device i the rows for device j begin."""
    return jnp.cumsum(counts, axis=1) - counts


def _send_ragged(rows: Array, counts: Array, axis: Axis) -> Array:
    size, me = len(counts), jax.lax.axis_index(axis)
    room = jnp.zeros((size * len(rows), rows.shape[1]), rows.dtype)
    sent = (_starts(counts)[me], counts[me], jnp.full(size, me * len(rows), counts.dtype), counts[:, me])
    return jax.lax.ragged_all_to_all(rows, room, *sent, axis_name=axis).reshape(size, *rows.shape)


def _back_ragged(received: Array, counts: Array, axis: Axis) -> Array:
    size, length = received.shape[:2]
    me = jax.lax.axis_index(axis)
    sent = (jnp.arange(size, dtype=counts.dtype) * length, counts[:, me], _starts(counts)[:, me], counts[me])
    rows = received.reshape(size * length, -1)
    return jax.lax.ragged_all_to_all(rows, jnp.zeros_like(received[0]), *sent, axis_name=axis)


def _send_padded(rows: Array, counts: Array, axis: Axis) -> Array:
    me, place = jax.lax.axis_index(axis), jnp.arange(len(rows))
    row = jnp.where(place < counts[me][:, None], _starts(counts)[me][:, None] + place, len(rows))
    return jax.lax.all_to_all(_take(rows, row), axis, 0, 0, tiled=True)


def _back_padded(received: Array, counts: Array, axis: Axis) -> Array:
    (size, length, width), me = received.shape, jax.lax.axis_index(axis)
    ends, place = jnp.cumsum(counts[me]), jnp.arange(length)
    device = jnp.searchsorted(ends, place, side="right", method="compare_all")
    start = jnp.take(_starts(counts)[me], device, mode="clip")
    row = jnp.where(device < size, device * length + place - start, size * length)
    return _take(jax.lax.all_to_all(received, axis, 0, 0, tiled=True).reshape(-1, width), row)


def _take(rows: Array, places: Array) -> Array:
    """Returns the rows at `places`, zero for one beyond the last."""
    return jnp.take(rows, places, axis=0, mode="fill", fill_value=0)


def _no_gradient(counts: Array) -> np.ndarray:
    return np.zeros(counts.shape, jax.dtypes.float0)


send.defvjp(
    lambda rows, counts, axis: (send(rows, counts, axis), counts),
    lambda axis, counts, gradient: (send_back(gradient, counts, axis), _no_gradient(counts)),
)
send_back.defvjp(
    lambda received, counts, axis: (send_back(received, counts, axis), counts),
    lambda axis, counts, gradient: (send(gradient, counts, axis), _no_gradient(counts)),
)

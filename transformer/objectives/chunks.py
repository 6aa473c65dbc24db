"""Sums over tokens a chunk at a time, for what is too large to exist for all of them: their logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Sums = Callable[..., dict[str, Float[Array, ""]]]
"""From arrays [B, T, ...] to sums over all that they hold."""


def in_chunks(sums: Sums, size: int) -> Sums:
    """Returns `sums` taken over `size` tokens of each text at a time, and again where the gradient asks for them.

    Rows of zeros fill the last chunk, and must add nothing: their weights are zero too.
    """

    def chunked(*arrays: Array) -> dict[str, Float[Array, ""]]:
        batch, length = arrays[0].shape[:2]
        if length <= size:
            return sums(*arrays)
        count = -(-length // size)

        def split(array: Array) -> Array:
            padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (array.ndim - 2)
            chunks = jnp.pad(array, padding).reshape(batch, count, size, *array.shape[2:])
            return chunks.swapaxes(0, 1)

        def add(before: dict[str, Array], chunk: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
            return jax.tree.map(jnp.add, before, sums(*chunk)), None

        zero = jax.tree.map(lambda it: jnp.zeros(it.shape, it.dtype), jax.eval_shape(sums, *arrays))
        # What a chunk computes is not kept for its gradient, or all logits would be there at the end after all.
        return jax.lax.scan(jax.checkpoint(add), zero, tuple(map(split, arrays)))[0]

    return chunked

"""Sums over tokens a chunk at a time, for what is too large to exist for all of them: their logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.parallel.parts import num_parts

Sums = Callable[..., dict[str, Float[Array, "..."]]]
"""From arrays [B, T, ...] to sums over tokens: over all of them, or over those of each text."""


def in_chunks(sums: Sums, size: int) -> Sums:
    """Returns `sums` taken over `size` tokens of each text at a time, and again where the gradient asks for them.

    Rows of zeros fill the last chunk, and must add nothing: their weights are zero too.
    """

    def chunked(*arrays: Array) -> dict[str, Float[Array, "..."]]:
        batch, length = arrays[0].shape[:2]
        if length <= size:
            return sums(*arrays)
        # Of texts that are split over devices a chunk has tokens of every part, so that none waits for another.
        parts = num_parts(length)
        own, length = -(-size // parts), length // parts
        count = -(-length // own)

        def split(array: Array) -> Array:
            array = array.reshape(batch, parts, length, *array.shape[2:])
            padding = [(0, 0), (0, 0), (0, count * own - length)] + [(0, 0)] * (array.ndim - 3)
            chunks = jnp.pad(array, padding).reshape(batch, parts, count, own, *array.shape[3:])
            return jnp.moveaxis(chunks, 2, 0).reshape(count, batch, parts * own, *array.shape[3:])

        def add(before: dict[str, Array], chunk: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
            return jax.tree.map(jnp.add, before, sums(*chunk)), None

        zero = jax.tree.map(lambda it: jnp.zeros(it.shape, it.dtype), jax.eval_shape(sums, *arrays))
        # What a chunk computes is not kept for its gradient, or all logits would be there at the end after all.
        return jax.lax.scan(jax.checkpoint(add), zero, tuple(map(split, arrays)))[0]

    return chunked

"""Causal attention a block of queries at a time, each block with the keys up to its own end: half the work, for CPUs.

The gradient is written out, for what XLA's CPU backend makes of the derivative of the definition keeps more and multiplies
slowly: the weights are kept before they are normalised; each array that several products read is written to memory once; and
a product with one large operand never has to transpose that one.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.models.dot_product import LOWEST
from transformer.models.masks import Mask

SMALLEST, MOST = 64, 8
"""Queries of a block, and blocks, beyond which those grow: each pair of them is compiled for itself."""

_written = jax.lax.optimization_barrier


def product(spec: str, left: Array, right: Array) -> Float[Array, "..."]:
    """Returns `einsum` in float32, which bfloat16 is widened to first: XLA's CPU backend fails on some mixed products."""
    return jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32))


def causal_blocks(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N U"]:
    """Returns what `dot_product_attention` does; takes no bias and no soft cap."""
    assert bias is None and not soft_cap, "refused by config.implementations"
    batch, length, num_heads, width = query.shape
    query = query * (1 / math.sqrt(width) if scale is None else scale)
    query = query.reshape(batch, length, key.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    places, structure = jax.tree.flatten(mask)  # apart, for its arrays have no gradients
    output: Array = _attend(structure, query, key.swapaxes(1, 2), value.swapaxes(1, 2), places)
    return output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)


def _blocks(mask: Mask) -> list[tuple[slice, slice]]:
    """Returns the queries of each block, and the keys that they may see."""
    size = max(SMALLEST, math.ceil(mask.num_queries / MOST))
    starts = range(0, mask.num_queries, size)
    ends = [min(start + size, mask.num_queries) for start in starts]
    return [(slice(*pair), slice(*mask.columns(*pair))) for pair in zip(starts, ends, strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(structure: Any, query: Array, key: Array, value: Array, places: list[Array]) -> Array:
    return _forward(structure, query, key, value, places)[0]


def _forward(structure: Any, query: Array, key: Array, value: Array, places: list[Array]) -> tuple[Array, Any]:
    query, key, value = _written((query, key, value))
    mask: Mask = jax.tree.unflatten(structure, places)
    kept = []
    for rows, columns in _blocks(mask):
        seen = mask.queries(rows.start, rows.stop - rows.start).keys(columns.start, columns.stop - columns.start)
        logits = product("bkgth,bksh->bkgts", query[:, :, :, rows], key[:, :, columns])
        logits = jnp.where(seen.visible()[:, None, None], logits, LOWEST)
        # Below what any query sees, so that the weights of one that sees nothing are zero.
        largest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), LOWEST / 2)
        weights = _written(jnp.exp(logits - largest).astype(value.dtype))
        total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
        inverse = jnp.where(total > 0, 1 / total, 0)
        output = product("bkgts,bksu->bkgtu", weights, value[:, :, columns]) * inverse
        kept.append((weights, inverse, output.astype(value.dtype)))
    output = jnp.concatenate([output for _, _, output in kept], axis=3)
    return output, (query, key, value, places, [(weights, inverse) for weights, inverse, _ in kept], output)


def _backward(structure: Any, residuals: Any, ahead: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, places, kept, output = residuals
    mask: Mask = jax.tree.unflatten(structure, places)
    to_query, to_keys, to_values = [], [], []
    for (rows, columns), (weights, inverse) in zip(_blocks(mask), kept, strict=True):
        toward = ahead[:, :, :, rows].astype(jnp.float32) * inverse
        along = jnp.sum(toward * output[:, :, :, rows], axis=-1, keepdims=True)
        toward = toward.astype(value.dtype)
        to_weights = product("bkgtu,bksu->bkgts", toward, value[:, :, columns])
        to_logits = _written((weights * (to_weights - along)).astype(query.dtype))
        to_query.append(product("bkgts,bksh->bkgth", to_logits, key[:, :, columns]))
        outside = [(0, 0)] * 3 + [(columns.start, key.shape[2] - columns.stop)]
        to_keys.append(jnp.pad(product("bkgth,bkgts->bkhs", query[:, :, :, rows], to_logits), outside))
        to_values.append(jnp.pad(product("bkgtu,bkgts->bkus", toward, weights), outside))
    to_key, to_value = (functools.reduce(jnp.add, parts).swapaxes(2, 3) for parts in (to_keys, to_values))
    return (
        jnp.concatenate(to_query, axis=3).astype(query.dtype),
        to_key.astype(key.dtype),
        to_value.astype(value.dtype),
        None,
    )


_attend.defvjp(_forward, _backward)

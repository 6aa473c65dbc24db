"""Matrix products of rows that lie group by group, each group with a matrix of its own; and how tokens get there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import RaggedDotDimensionNumbers
from jaxtyping import Array, Float, Int

BLOCK = 128
"""Rows that are multiplied at a time where XLA has no product of this kind."""


@jax.custom_vjp
def grouped_product(
    x: Float[Array, "M I"], weights: Float[Array, "X I O"], sizes: Int[Array, "X"]
) -> Float[Array, "M O"]:
    """Returns the product of each row with its group's matrix: the first `sizes[0]` rows are of the first group, and so on.

    Rows beyond the last group give zero.
    """
    return jax.lax.platform_dependent(x, weights, sizes, tpu=product_by_ragged_dot, default=product_by_blocks)


def _forward(x: Array, weights: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_product(x, weights, sizes), (x, weights, sizes)


def _backward(saved: tuple[Array, ...], gradient: Array) -> tuple[Array, Array, np.ndarray]:
    x, weights, sizes = saved
    of_weights = jax.lax.platform_dependent(x, gradient, sizes, tpu=outer_by_ragged_dot, default=outer_by_blocks)
    return grouped_product(gradient, weights.mT, sizes), of_weights, _no_gradient(sizes)


grouped_product.defvjp(_forward, _backward)


def _in_groups(x: Array, sizes: Array) -> Array:
    """Returns `x` with zeros in the rows beyond the last group, which a ragged product leaves undefined."""
    return jnp.where((jnp.arange(len(x)) < jnp.sum(sizes))[:, None], x, 0)


@jax.custom_batching.sequential_vmap
def product_by_ragged_dot(
    x: Float[Array, "M I"], weights: Float[Array, "X I O"], sizes: Int[Array, "X"]
) -> Float[Array, "M O"]:
    """Computes `grouped_product` by XLA's own, which but on a TPU multiplies every row with every matrix."""
    return _in_groups(jax.lax.ragged_dot(x, weights, sizes), sizes)


@jax.custom_batching.sequential_vmap
def outer_by_ragged_dot(
    x: Float[Array, "M I"], gradient: Float[Array, "M O"], sizes: Int[Array, "X"]
) -> Float[Array, "X I O"]:
    """Returns x^T gradient of each group."""
    rows = RaggedDotDimensionNumbers((([0], [0]), ([], [])), lhs_ragged_dimensions=[0], rhs_group_dimensions=[])
    return jax.lax.ragged_dot_general(_in_groups(x, sizes), _in_groups(gradient, sizes), sizes, rows)


def _blocks(sizes: Int[Array, "X"]) -> tuple[Any, Callable[[Any], tuple[Any, Any, Any]]]:
    """Returns the number of blocks, and a function that gives the group, first row and group's end of each.

    Blocks begin at the beginning of their group; the last one of a group reaches into the next.
    """
    ends, counts = jnp.cumsum(sizes), -(-sizes // BLOCK)
    last = jnp.cumsum(counts)

    def place(number: Any) -> tuple[Any, Any, Any]:
        group = jnp.sum(last <= number)
        row = ends[group] - sizes[group] + (number - last[group] + counts[group]) * BLOCK
        return group, row, ends[group]

    return last[-1], place


def product_by_blocks(
    x: Float[Array, "M I"], weights: Float[Array, "X I O"], sizes: Int[Array, "X"]
) -> Float[Array, "M O"]:
    """Computes `grouped_product` a block of rows at a time; what a block has of the next group is written anew by that."""
    (num_blocks, place), padded = _blocks(sizes), jnp.pad(x, ((0, BLOCK), (0, 0)))

    def body(number: Any, output: Array) -> Array:
        group, row, _ = place(number)
        rows = jax.lax.dynamic_slice_in_dim(padded, row, BLOCK)
        product = jnp.matmul(rows, weights[group], preferred_element_type=jnp.float32).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(output, product, row, 0)

    output = jnp.zeros((len(padded), weights.shape[2]), x.dtype)
    return _in_groups(jax.lax.fori_loop(0, num_blocks, body, output)[: len(x)], sizes)


def outer_by_blocks(
    x: Float[Array, "M I"], gradient: Float[Array, "M O"], sizes: Int[Array, "X"]
) -> Float[Array, "X I O"]:
    """Computes x^T gradient of each group a block of rows at a time."""
    num_blocks, place = _blocks(sizes)
    padded = [jnp.pad(rows, ((0, BLOCK), (0, 0))) for rows in (x, gradient)]

    def body(number: Any, total: Array) -> Array:
        group, row, end = place(number)
        left, right = (jax.lax.dynamic_slice_in_dim(rows, row, BLOCK) for rows in padded)
        left = jnp.where((row + jnp.arange(BLOCK) < end)[:, None], left, 0)
        product = jnp.matmul(left.T, right, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(total, total[group] + product, group, 0)

    total = jnp.zeros((len(sizes), x.shape[1], gradient.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, num_blocks, body, total).astype(x.dtype)


def sort_by_group(
    groups: Int[Array, "B T K"], num_groups: int
) -> tuple[Int[Array, "B M"], Int[Array, "B X"], Int[Array, "B T K"]]:
    """Returns the choices of each row in the order of their groups, the number in each, and each choice's rank in it.

    Choices are numbered token by token, t * K + j, and keep that order within a group. One of group `num_groups` is in
    none, and comes last. A token chooses a group once.
    """
    order = jnp.argsort(groups.reshape(len(groups), -1), axis=1, stable=True)
    chosen = groups[..., None] == jnp.arange(num_groups)
    counts = jnp.cumsum(jnp.any(chosen, axis=2), axis=1, dtype=jnp.int32)
    rank = jnp.sum(jnp.where(chosen, counts[:, :, None] - 1, 0), axis=-1)
    return order, counts[:, -1], rank


def _take(x: Float[Array, "B S D"], places: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Returns the rows at `places`, zero for one beyond the last."""
    return jnp.take_along_axis(x, places[:, :, None], axis=1, mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x: Float[Array, "B T D"], source: Int[Array, "B M"], target: Int[Array, "B T K"]) -> Float[Array, "B M D"]:
    """Copies tokens to the places that they chose.

    `source` is the choice, t * K + j, that each place is for, and `target` the place of each choice; T * K and M stand
    for none. Knowing both ways, neither this nor its gradient has to add up by index.
    """
    return _take(x, source // target.shape[2])


def _dispatch_backward(ways: tuple[Array, Array], gradient: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    source, target = ways
    taken = _take(gradient, target.reshape(len(target), -1))
    return jnp.sum(taken.reshape(*target.shape, -1), axis=2), _no_gradient(source), _no_gradient(target)


@jax.custom_vjp
def collect(
    rows: Float[Array, "B M D"], source: Int[Array, "B M"], target: Int[Array, "B T K"]
) -> Float[Array, "B T K D"]:
    """Returns what is at the place of each choice, zero where there is none: the way back of `dispatch`."""
    return _take(rows, target.reshape(len(target), -1)).reshape(*target.shape, -1)


def _collect_backward(ways: tuple[Array, Array], gradient: Array) -> tuple[Array, np.ndarray, np.ndarray]:
    source, target = ways
    taken = _take(gradient.reshape(len(gradient), -1, gradient.shape[-1]), source)
    return taken, _no_gradient(source), _no_gradient(target)


def _no_gradient(indices: Array) -> np.ndarray:
    return np.zeros(indices.shape, jax.dtypes.float0)


dispatch.defvjp(lambda x, *ways: (dispatch(x, *ways), ways), _dispatch_backward)
collect.defvjp(lambda rows, *ways: (collect(rows, *ways), ways), _collect_backward)

"""Attention in blocks of queries and keys, in memory that grows with the length and not with its square.

The softmax in one pass is that of Milakov and Gimelshein 2018 (arXiv:1805.02867); attention and its gradient by
recomputation are those of Rabe and Staats 2021 (arXiv:2112.05682) and Dao et al. 2022 (arXiv:2205.14135). Plain JAX: for
every platform, mask and bias. The pairs of blocks that can see each other are listed before compilation, and one loop
goes through the list: half of the square for a causal mask, a band for a window.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.models.dot_product import LOWEST, bend, product
from transformer.models.masks import Mask, Sparsity
from transformer.models.mixers import Bias

BLOCK = 256
"""Most tokens of a block; where little of each row is seen, blocks are smaller, down to `SMALLEST`."""

SMALLEST = 64

State = tuple[Float[Array, "*A"], Float[Array, "*A"], Float[Array, "*A U"]]
"""Of each query: the largest logit so far, and the sums of exponentials and of values weighted by them."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What is known of blocks and their logits before any data."""

    rows: int
    """Queries in a block."""
    columns: int
    """Keys in a block."""
    soft_cap: float
    skips: bool
    """Whether to look at each pair's mask, and leave out what nobody sees."""
    mask: Any
    """The mask without its arrays, which have no gradients."""
    bias: Any
    """The bias without its arrays."""


@dataclasses.dataclass(frozen=True)
class Plan(Blocks):
    """Which blocks meet, too."""

    spans: tuple[tuple[int, int], ...]
    """For each block of queries its first block of keys, and the one after its last."""

    @property
    def pairs(self) -> Int[np.ndarray, "P 2"]:
        """Blocks of queries, and the blocks of keys that they meet."""
        return np.asarray([(i, j) for i, span in enumerate(self.spans) for j in range(*span)], np.int32)


def _plan(mask: Mask, bias: Bias | None, soft_cap: float) -> tuple[Plan, list[Array], list[Array]]:
    """Returns the plan, and the arrays of the mask, filled up to whole blocks, and of the bias."""
    rows, columns = (block_size(length, mask.sparsity) for length in (mask.num_queries, mask.num_keys))
    spans = []
    for start in range(0, mask.num_queries, rows):
        first, stop = mask.columns(start, min(start + rows, mask.num_queries))
        spans.append((first // columns, math.ceil(min(stop, mask.num_keys) / columns)))
    # Where rows are split over devices, all would have to agree on each pair.
    mesh = jax.sharding.get_abstract_mesh()
    is_alone = mesh.size <= 1 or mesh.are_all_axes_manual
    query = jax.tree.map(partial(_pad, size=rows), mask.query)
    key = jax.tree.map(partial(_pad, size=columns), mask.key)
    places, mask_structure = jax.tree.flatten(dataclasses.replace(mask, query=query, key=key))
    tables, bias_structure = jax.tree.flatten(bias)
    skips = is_alone and is_scattered(mask.sparsity)
    return Plan(rows, columns, soft_cap, skips, mask_structure, bias_structure, tuple(spans)), places, tables


def is_scattered(sparsity: Sparsity | None) -> bool:
    """Returns whether a pattern leaves out blocks that columns alone do not tell."""
    return sparsity is not None and sparsity.reach is None


def block_size(length: int, sparsity: Sparsity | None) -> int:
    """Returns the tokens of a block, for blocks as even as can be, so that little is padding."""
    most = BLOCK
    if sparsity is not None:
        most = max(SMALLEST, min(BLOCK, BLOCK // 2 if sparsity.reach is None else sparsity.reach + 1))
    size = math.ceil(length / math.ceil(length / most))
    return size if size == length else 8 * math.ceil(size / 8)


def blockwise_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N U"]:
    """Returns what `dot_product_attention` does, of which it never holds more than `BLOCK` by `BLOCK` logits at a time."""
    (batch, length, num_heads, width), kv_heads = query.shape, key.shape[2]
    query = query * (1 / math.sqrt(width) if scale is None else scale)
    plan, places, tables = _plan(mask, bias, soft_cap)

    def blocks(x: Array, size: int) -> Array:
        """Cuts the tokens into blocks, and puts them first and the heads before the tokens."""
        x = _pad(x, size).reshape(batch, -1, size, kv_heads, x.shape[2] // kv_heads, x.shape[3])
        return x.transpose(1, 0, 3, 4, 2, 5)

    keys, values = (blocks(x, plan.columns)[:, :, :, 0] for x in (key, value))
    output: Array = _attend(plan, blocks(query, plan.rows), keys, values, places, tables)
    return output.transpose(1, 0, 4, 2, 3, 5).reshape(batch, -1, num_heads, value.shape[3])[:, :length]


def _pad(x: Array, size: int) -> Array:
    """Fills up the tokens of the last block; of zeros, so that they are of segment 0."""
    missing = -x.shape[1] % size
    return jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)]) if missing else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, query: Array, key: Array, value: Array, places: list[Array], tables: list[Array]) -> Array:
    return _forward(plan, query, key, value, places, tables)[0]


def _forward(
    plan: Plan, query: Array, key: Array, value: Array, places: list[Array], tables: list[Array]
) -> tuple[Array, Any]:
    def step(states: State, pair: Array) -> tuple[State, None]:
        i, j = pair
        state: State = jax.tree.map(lambda x: x[i], states)
        state = with_block(plan, state, query[i], key[j], value[j], _seen(plan, places, pair), tables)
        return put(states, state, i), None

    states = nothing_seen(query.shape[:-1], value.shape[-1])
    states, _ = jax.lax.scan(step, states, jnp.asarray(plan.pairs))
    output, logsumexp = normalized(states, value.dtype)
    return output, (query, key, value, places, tables, output, logsumexp)


def _backward(plan: Plan, residuals: Any, ahead: Array) -> tuple[Any, ...]:
    query, key, value, places, tables, output, logsumexp = residuals
    dot = jnp.sum(ahead.astype(jnp.float32) * output, axis=-1)

    def step(sums: Any, pair: Array) -> tuple[Any, None]:
        i, j = pair
        to_query, to_key, to_value, to_tables = sums
        here = (to_query[i], to_key[j], to_value[j], to_tables)
        rows = Rows(query[i], ahead[i], dot[i], logsumexp[i])
        here = with_gradients(plan, here, rows, key[j], value[j], _seen(plan, places, pair), tables)
        return (put(to_query, here[0], i), *put((to_key, to_value), here[1:3], j), here[3]), None

    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (query, key, value, tables))
    sums, _ = jax.lax.scan(step, sums, jnp.asarray(plan.pairs))
    to_query, to_key, to_value, to_tables = jax.tree.map(
        lambda total, x: total.astype(x.dtype), sums, (query, key, value, tables)
    )
    return to_query, to_key, to_value, None, to_tables


_attend.defvjp(_forward, _backward)


def nothing_seen(shape: tuple[int, ...], value_width: int) -> State:
    """Returns the state of queries before any key."""
    # The largest so far begins at half of what is not seen, so that the exponential of that is always 0.
    return jnp.full(shape, LOWEST / 2), jnp.zeros(shape), jnp.zeros((*shape, value_width))


def with_block(
    blocks: Blocks, state: State, query: Array, key: Array, value: Array, seen: Mask, tables: list[Array]
) -> State:
    """Returns the state of a block of queries when they have met a block of keys, under the mask of that pair."""
    visible = seen.visible()

    def meet(state: State) -> State:
        largest, total, output = state
        logits = _bend(product("bkgth,bksh->bkgts", query, key), tables, seen, blocks)
        logits = jnp.where(visible[:, None, None], logits, LOWEST)
        larger = jnp.maximum(largest, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - larger[..., None])
        kept = jnp.exp(largest - larger)
        total = kept * total + jnp.sum(weights, axis=-1)
        gathered = product("bkgts,bksu->bkgtu", weights.astype(value.dtype), value)
        return larger, total, kept[..., None] * output + gathered

    return _unless_blind(blocks, visible, meet, state)


def normalized(state: State, dtype: Any) -> tuple[Array, Array]:
    """Returns the outputs of queries that have met all keys, zero for those that saw none, and the logarithms of their sums."""
    largest, total, output = state
    is_blind = total == 0
    total = jnp.where(is_blind, 1, total)
    return (output / total[..., None]).astype(dtype), jnp.where(is_blind, 0, largest + jnp.log(total))


class Rows(NamedTuple):
    """What the gradient needs of a block of queries."""

    query: Array
    ahead: Array
    """The gradient of their outputs."""
    dot: Array
    """Its products with the outputs."""
    logsumexp: Array


def with_gradients(
    blocks: Blocks, sums: Any, rows: Rows, key: Array, value: Array, seen: Mask, tables: list[Array]
) -> tuple[Any, ...]:
    """Returns the gradients of queries, keys, values and the bias's arrays with what a pair of blocks adds to each."""
    visible = seen.visible()

    def meet(sums: Any) -> Any:
        raw = product("bkgth,bksh->bkgts", rows.query, key)
        logits, bent = jax.vjp(lambda raw, tables: _bend(raw, tables, seen, blocks), raw, tables)
        weights = jnp.exp(jnp.where(visible[:, None, None], logits, LOWEST) - rows.logsumexp[..., None])
        to_weights = product("bkgtu,bksu->bkgts", rows.ahead, value)
        to_raw, to_tables = bent(weights * (to_weights - rows.dot[..., None]))
        to_raw, weights = to_raw.astype(rows.query.dtype), weights.astype(value.dtype)
        to_query = product("bkgts,bksh->bkgth", to_raw, key)
        to_key = product("bkgts,bkgth->bksh", to_raw, rows.query)
        to_value = product("bkgts,bkgtu->bksu", weights, rows.ahead)
        return jax.tree.map(jnp.add, sums, (to_query, to_key, to_value, to_tables))

    return _unless_blind(blocks, visible, meet, sums)


def _bend(raw: Array, tables: list[Array], seen: Mask, blocks: Blocks) -> Array:
    return bend(raw, seen, jax.tree.unflatten(blocks.bias, tables), blocks.soft_cap)


def _seen(plan: Plan, places: list[Array], pair: Array) -> Mask:
    mask: Mask = jax.tree.unflatten(plan.mask, places)
    return mask.queries(pair[0] * plan.rows, plan.rows).keys(pair[1] * plan.columns, plan.columns)


def _unless_blind(blocks: Blocks, visible: Array, change: Callable[[Any], Any], state: Any) -> Any:
    return jax.lax.cond(jnp.any(visible), change, lambda same: same, state) if blocks.skips else change(state)


def put(arrays: Any, items: Any, index: Array) -> Any:
    """Returns the arrays with their items of one index replaced."""
    return jax.tree.map(lambda x, item: jax.lax.dynamic_update_index_in_dim(x, item, index, 0), arrays, items)

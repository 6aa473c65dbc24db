"""Attention of texts that are split over devices: keys and values go round a ring (Liu et al. 2023, arXiv:2310.01889).

Each device keeps its queries and meets the keys of one device after another, by the blocks of `blockwise`, while the next
ones travel. The gradient goes round again, and the gradients of keys and values travel with them. Memory is that of a
device's own tokens, whatever the number of devices. Which blocks a device computes in which step is listed before
compilation, from the columns that the mask lets each block see; the programs of all devices loop over their own lists.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from transformer.config import ConfigError
from transformer.models.blockwise import (
    Blocks,
    Rows,
    State,
    block_size,
    is_scattered,
    normalized,
    nothing_seen,
    put,
    with_block,
    with_gradients,
)
from transformer.models.masks import Mask
from transformer.models.mixers import Bias
from transformer.parallel.parts import AXIS, Layout, layout_of, num_parts, on_parts, shift

IMPLEMENTATIONS = ("auto", "blockwise")
"""What `model.attention_implementation` may be here."""


@dataclass(frozen=True, eq=False)
class Ring(Blocks):
    """What is known before any data."""

    lengths: tuple[int, int]
    """Queries and keys of a device."""
    num_runs: int
    """Runs of columns that a device holds: 1, its part of the text; or 2, one from the text's first half and its mirror
    image from the second, so that causal queries see as many keys on every device."""
    first: int
    """How many places before it on the ring the first keys are from that a device meets."""
    spans: Int[np.ndarray, "E S Z 2"]
    """For each device and step, and each pair of a block of queries and a run of keys, in this order: the first block of
    keys to meet, and the one after the last."""

    @property
    def num_pairs(self) -> Int[np.ndarray, "E S"]:
        """Pairs of blocks that each device computes in each step."""
        return np.sum(self.spans[..., 1] - self.spans[..., 0], axis=2)


def attend(name: str, *arrays: Any, **options: Any) -> Float[Array, "B T N U"]:
    """Returns `ring_attention`; raises ConfigError for an implementation other than its own."""
    if name not in IMPLEMENTATIONS:
        advice = "use 'auto', or model.context_attention = 'all_to_all'"
        raise ConfigError(f"model.attention_implementation = {name!r}: a ring computes by blocks of its own; {advice}")
    return ring_attention(*arrays, **options)


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N U"]:
    """Returns what `dot_product_attention` does, of lengths that the mesh's `context` axis divides."""
    query = query * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    layout = layout_of(query)
    key, value = (layout.repeated(x) for x in (key, value))
    tables, structure = jax.tree.flatten(bias)
    ring = plan(mask, num_parts(), soft_cap, structure)
    output: Array = _attend(ring, layout, query, key, value, *map(jax.tree.leaves, (mask.query, mask.key)), tables)
    return output


def plan(mask: Mask, num_devices: int, soft_cap: float = 0.0, bias: Any = None) -> Ring:
    """Returns the ring whose busiest devices compute least, step by step: all wait for each other at the end of each."""
    deals = [1, 2] if mask.aligned and mask.num_queries % (2 * num_devices) == 0 else [1]
    rings = [_ring(mask, num_devices, runs, soft_cap, bias) for runs in deals]
    return min(rings, key=lambda ring: np.sum(np.max(ring.num_pairs, axis=0)) * ring.rows * ring.columns)


def runs_of(num_devices: int, num_runs: int) -> Int[np.ndarray, "E R"]:
    """Returns the runs of columns that each device holds."""
    device = np.arange(num_devices)[:, None]
    return device if num_runs == 1 else np.concatenate([device, 2 * num_devices - 1 - device], axis=1)


def _ring(mask: Mask, num_devices: int, num_runs: int, soft_cap: float, bias: Any) -> Ring:
    runs, lengths = runs_of(num_devices, num_runs), (mask.num_queries // num_devices, mask.num_keys // num_devices)
    of_queries, of_keys = (length // num_runs for length in lengths)
    rows, columns = block_size(of_queries, mask.sparsity), block_size(of_keys, mask.sparsity)
    blocks = [(start, min(start + rows, of_queries)) for start in range(0, of_queries, rows)]
    seen = np.asarray(
        [
            [mask.columns(run * of_queries + start, run * of_queries + end) for run in own for start, end in blocks]
            for own in runs.tolist()
        ]
    )
    # In step s a device meets the keys of the one s places before it: [devices, steps, blocks of queries, runs of keys, 2].
    source = (np.arange(num_devices)[:, None] - np.arange(num_devices)) % num_devices
    seen = np.clip(seen[:, None, :, None] - (runs * of_keys)[source][:, :, None, :, None], 0, of_keys)
    spans = np.stack([seen[..., 0] // columns, -(-seen[..., 1] // columns)], axis=-1)
    spans = np.where(seen[..., :1] < seen[..., 1:], spans + np.arange(num_runs)[:, None] * -(-of_keys // columns), 0)
    spans = spans.reshape(num_devices, num_devices, -1, 2).astype(np.int32)
    first, count = _busy_arc(np.any(spans[..., 0] < spans[..., 1], axis=(0, 2)).tolist())
    spans = spans[:, (first + np.arange(count)) % num_devices]
    structure, skips = jax.tree.structure(mask), is_scattered(mask.sparsity)
    return Ring(rows, columns, soft_cap, skips, structure, bias, lengths, num_runs, first, spans)


def _busy_arc(busy: list[bool]) -> tuple[int, int]:
    """Returns the first step and the number of steps of the shortest arc of the ring outside which there is no work."""
    count = len(busy)
    idle = [next((n for n in range(count) if busy[(start + n) % count]), count) for start in range(count)]
    start = max(range(count), key=idle.__getitem__)
    return (start + idle[start]) % count, count - idle[start]


class Keys(NamedTuple):
    """What travels, in blocks: [J, B, ...]."""

    key: Array
    value: Array
    places: list[Array]


Arguments = tuple[Array, Array, Array, list[Array], list[Array], list[Array]]
"""Queries, keys and values, the arrays of their places, and those of the bias."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(ring: Ring, layout: Layout, *arguments: Any) -> Array:
    return _forward(ring, layout, *arguments)[0]


def _specs(layout: Layout, tables: list[Array]) -> tuple[PartitionSpec, Any]:
    """Returns the layouts of activations, and of the arguments of `_attend`."""
    heads, tokens = layout.activations, layout.tokens
    return heads, (heads, heads, heads, tokens, tokens, [layout.per_head(table) for table in tables])


def _forward(ring: Ring, layout: Layout, *arguments: Any) -> tuple[Array, Any]:
    heads, specs = _specs(layout, arguments[-1])
    output, logsumexp = on_parts(functools.partial(_forward_part, ring), (specs,), (heads, heads))(arguments)
    return output, (arguments, output, logsumexp)


def _backward(ring: Ring, layout: Layout, residuals: Any, ahead: Array) -> tuple[Any, ...]:
    tables = residuals[0][-1]
    heads, specs = _specs(layout, tables)

    def part(*arrays: Any) -> Any:
        *gradients, to_tables = _backward_part(ring, *arrays)
        to_tables = jax.lax.psum(to_tables, (*layout.batch, AXIS))
        return *gradients, [total.astype(table.dtype) for total, table in zip(to_tables, tables, strict=True)]

    run = on_parts(part, (specs, heads, heads, heads), (*specs[:3], specs[-1]))
    to_query, to_key, to_value, to_tables = run(*residuals, ahead)
    return to_query, to_key, to_value, None, None, to_tables


def _forward_part(ring: Ring, arguments: Arguments) -> tuple[Array, Array]:
    """Returns what a device's queries gather, and the logarithms of the sums of their exponentials: [B, T, N, U], [B, T, N]."""
    *_, tables = arguments
    query, query_places, keys = _hold(ring, arguments)

    def meet(spans: Array, visiting: Keys, states: State) -> State:
        def meet_run(number: Array, states: State) -> State:
            i, (start, stop) = number // ring.num_runs, spans[number]

            def meet_block(j: Array, state: State) -> State:
                seen = _seen(ring, query_places, i, visiting, j)
                return with_block(ring, state, query[i], visiting.key[j], visiting.value[j], seen, tables)

            return put(states, jax.lax.fori_loop(start, stop, meet_block, _item(states, i)), i)

        return jax.lax.fori_loop(0, len(spans), meet_run, states)

    def step(carry: Any, spans: Array) -> tuple[Any, None]:
        visiting, states = carry
        # The next keys come meanwhile; after the last step for nothing, or the loop's body would be compiled twice.
        return (shift(visiting, 1), meet(spans, visiting, states)), None

    states = nothing_seen(query.shape[:-1], keys.value.shape[-1])
    (_, states), _ = jax.lax.scan(step, (shift(keys, ring.first), states), _own_spans(ring))
    output, logsumexp = normalized(states, keys.value.dtype)
    output, logsumexp = _ungrouped(ring, output), _ungrouped(ring, logsumexp[..., None])
    return output, logsumexp[..., 0]


def _backward_part(
    ring: Ring, arguments: Arguments, output: Array, logsumexp: Array, ahead: Array
) -> tuple[Array, Array, Array, list[Array]]:
    """Returns the gradients of queries, keys, values and, in float32 and of this device alone, of the bias's arrays."""
    *_, tables = arguments
    query, query_places, keys = _hold(ring, arguments)
    kv_heads = query.shape[2]
    dot = jnp.sum(ahead.astype(jnp.float32) * output, axis=-1)
    ahead = _grouped(ring, ahead, kv_heads)
    dot, logsumexp = (_grouped(ring, x[..., None], kv_heads)[..., 0] for x in (dot, logsumexp))

    def meet(spans: Array, visiting: Keys, sums: Any) -> Any:
        def meet_run(number: Array, sums: Any) -> Any:
            i, (start, stop) = number // ring.num_runs, spans[number]
            rows = Rows(query[i], ahead[i], dot[i], logsumexp[i])

            def meet_block(j: Array, sums: Any) -> Any:
                to_row, to_keys, to_tables = sums
                here = (to_row, *_item(to_keys, j), to_tables)
                seen = _seen(ring, query_places, i, visiting, j)
                here = with_gradients(ring, here, rows, visiting.key[j], visiting.value[j], seen, tables)
                return here[0], put(to_keys, here[1:3], j), here[3]

            to_query, *others = sums
            to_row, *others = jax.lax.fori_loop(start, stop, meet_block, (to_query[i], *others))
            return put(to_query, to_row, i), *others

        return jax.lax.fori_loop(0, len(spans), meet_run, sums)

    def step(carry: Any, spans: Array) -> tuple[Any, None]:
        visiting, sums = carry
        to_query, to_keys, to_tables = meet(spans, visiting, sums)
        return (shift(visiting, 1), (to_query, shift(to_keys, 1), to_tables)), None

    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (query, (keys.key, keys.value), tables))
    (_, sums), _ = jax.lax.scan(step, (shift(keys, ring.first), zero), _own_spans(ring))
    to_query, to_keys, to_tables = sums
    home = shift(to_keys, -ring.first - ring.spans.shape[1])
    to_key, to_value = (
        _undealt(ring, total.astype(x.dtype).swapaxes(2, 3), ring.lengths[1])
        for total, x in zip(home, (keys.key, keys.value), strict=True)
    )
    return _ungrouped(ring, to_query.astype(query.dtype)), to_key, to_value, to_tables


_attend.defvjp(_forward, _backward)


def _own_spans(ring: Ring) -> Int[Array, "S Z 2"]:
    return jnp.asarray(ring.spans)[jax.lax.axis_index(AXIS)]


def _seen(ring: Ring, query_places: list[Array], i: Array, keys: Keys, j: Array) -> Mask:
    mask: Mask = jax.tree.unflatten(ring.mask, [*_item(query_places, i), *_item(keys.places, j)])
    return mask


def _item(arrays: Any, index: Array) -> Any:
    return jax.tree.map(lambda x: x[index], arrays)


def _hold(ring: Ring, arguments: Arguments) -> tuple[Array, list[Array], Keys]:
    """Returns a device's queries, the arrays of their places, and its keys, dealt and in blocks."""
    query, key, value, query_places, key_places, _ = arguments
    keys, values = (_dealt(ring, x, ring.columns).swapaxes(2, 3) for x in (key, value))
    travelling = Keys(keys, values, [_dealt(ring, x, ring.columns) for x in key_places])
    return _grouped(ring, query, key.shape[2]), [_dealt(ring, x, ring.rows) for x in query_places], travelling


def _grouped(ring: Ring, x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "I B K G C H"]:
    """Returns blocks of what queries have, the heads in groups that share keys, before the tokens."""
    x = _dealt(ring, x, ring.rows)
    return x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1]).transpose(0, 1, 3, 4, 2, 5)


def _ungrouped(ring: Ring, x: Float[Array, "I B K G C H"]) -> Float[Array, "B T N H"]:
    x = x.transpose(0, 1, 4, 2, 3, 5)
    return _undealt(ring, x.reshape(*x.shape[:3], -1, x.shape[-1]), ring.lengths[0])


def _dealt(ring: Ring, x: Array, size: int) -> Array:
    """Returns a device's runs for its part of an array [B, T, ...], in blocks [I, B, size, ...]; tokens of segment 0 fill up
    each run."""
    x = _deal(ring, x)
    x = x.reshape(len(x), ring.num_runs, -1, *x.shape[2:])
    x = jnp.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % size)] + [(0, 0)] * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(len(x), -1, size, *x.shape[3:]), 1, 0)


def _undealt(ring: Ring, x: Array, length: int) -> Array:
    """Returns a device's part for its runs in blocks: [I, B, C, ...] to [B, length, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    x = x.reshape(len(x), ring.num_runs, -1, *x.shape[3:])[:, :, : length // ring.num_runs]
    return _deal_back(ring, x.reshape(len(x), length, *x.shape[3:]))


def _deal(ring: Ring, x: Array) -> Array:
    """Returns a device's runs of an array [B, T, ...] for its part of it. Even runs and odd ones travel apart: every device
    gives and gets one of each."""
    if ring.num_runs == 1:
        return x
    even, odd = (jax.lax.ppermute(half, AXIS, way) for half, way in zip(jnp.split(x, 2, axis=1), _ways(), strict=True))
    return jnp.concatenate(_crossed(even, odd), axis=1)


def _deal_back(ring: Ring, x: Array) -> Array:
    """Returns a device's part of an array for its runs of it."""
    if ring.num_runs == 1:
        return x
    back = [[(holder, device) for device, holder in way] for way in _ways()]
    halves = zip(_crossed(*jnp.split(x, 2, axis=1)), back, strict=True)
    return jnp.concatenate([jax.lax.ppermute(half, AXIS, way) for half, way in halves], axis=1)


def _ways() -> list[list[tuple[int, int]]]:
    """Returns for the first and for the second run of each device's part the device that it is dealt to."""
    count = jax.lax.axis_size(AXIS)
    holders = [min(run, 2 * count - 1 - run) for run in range(2 * count)]
    return [[(device, holders[2 * device + half]) for device in range(count)] for half in (0, 1)]


def _crossed(one: Array, other: Array) -> tuple[Array, Array]:
    """Returns both on even devices, and the other first on odd ones: the first run there is an odd one."""
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    return jnp.where(is_even, one, other), jnp.where(is_even, other, one)

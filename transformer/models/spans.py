"""Where a recurrence starts anew: packed segments and padding as what a state sees of them, token by token or by chunks."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Int

from transformer.models.mixers import Context
from transformer.parallel.parts import AXIS, before, handed_on, num_parts, on_parts
from transformer.parallel.sharding import partition_spec


@dataclass(frozen=True)
class Spans:
    """Tokens that share a state; a pytree.

    Padding belongs to the span before it, and so does what a span has left behind in a cache.
    """

    is_token: Bool[Array, "B T"]
    number: Int[Array, "B T"]
    """Counts spans along a row; 0: what continues the state that there was before."""

    @property
    def starts(self) -> Bool[Array, "B T"]:
        """Whether a token is the first of its span."""
        return self.number != jnp.pad(self.number, ((0, 0), (1, 0)))[:, :-1]


jax.tree_util.register_dataclass(Spans, ["is_token", "number"], [])


def spans_of(segment_ids: Int[Array, "B T"], previous: Int[Array, "B"] | None = None) -> Spans:
    """Returns the spans of a batch that follows tokens of segment `previous`, or nothing.

    Segments of one row must not interleave; padding (segment 0) may stand anywhere.
    """
    if previous is None and num_parts(segment_ids.shape[1]) > 1:
        return _over_parts(segment_ids)
    previous = jnp.zeros_like(segment_ids[:, 0]) if previous is None else previous
    known = jnp.concatenate([previous[:, None], segment_ids], axis=1)
    places = jnp.arange(known.shape[1])
    last = jax.lax.cummax(jnp.where(known != 0, places, 0), axis=1)
    latest = jnp.take_along_axis(known, last, axis=1)  # the segment of the last token up to each place
    is_token = segment_ids != 0
    starts = is_token & (segment_ids != latest[:, :-1])
    return Spans(is_token, jnp.cumsum(starts, axis=1, dtype=jnp.int32))


def _over_parts(segment_ids: Int[Array, "B T"]) -> Spans:
    """Returns the spans of texts that are split over devices, each of which looks at its own part."""

    def part(segment_ids: Array) -> Spans:
        columns = jnp.arange(segment_ids.shape[1])
        last = jnp.argmax(jnp.where(segment_ids != 0, columns, -1), axis=1)
        latest = jnp.take_along_axis(segment_ids, last[:, None], axis=1)  # 0: there is none but padding
        previous = before(latest, lambda later, earlier: jnp.where(later != 0, later, earlier))
        spans = spans_of(segment_ids, previous[:, 0])
        return Spans(spans.is_token, spans.number + before(spans.number[:, -1:], jnp.add))

    (rows,) = partition_spec(("batch",), segment_ids.shape[:1], jax.sharding.get_abstract_mesh().shape)
    spec = PartitionSpec(rows, AXIS)
    return on_parts(part, spec, spec)(segment_ids)


def own_part(spans: Spans) -> Spans:
    """Returns the spans of a device's part, the first of which may continue what is in the state that it is handed."""
    return Spans(spans.is_token, spans.number - handed_on(spans.number[:, -1:]))


def spans_in(context: Context) -> Spans:
    """Returns the spans of a pass, the first of which may continue what is in the cache."""
    if context.index is None:
        return spans_of(context.tokens.segment_ids)
    segments = context.columns.segment_ids
    columns = jnp.arange(segments.shape[1])
    last = jnp.max(jnp.where((segments != 0) & (columns < context.index), columns, -1), axis=1, keepdims=True)
    previous = jnp.take_along_axis(segments, jnp.maximum(last, 0), axis=1)
    return spans_of(context.tokens.segment_ids, jnp.where(last < 0, 0, previous)[:, 0])


@dataclass(frozen=True)
class ChunkMasks:
    """Which pairs within chunks, and which tokens and states across them, belong to one span."""

    pairs: Bool[Array, "B 1 G C C"]
    """Query and key of one chunk, the key not later."""
    enters: Bool[Array, "B 1 G C"]
    """Tokens that see the state before their chunk."""
    leaves: Bool[Array, "B 1 G C"]
    """Tokens that the state after their chunk has seen."""
    carries: Bool[Array, "B 1 G"]
    """Chunks that the state before passes through."""


def chunk_masks(spans: Spans, size: int) -> ChunkMasks:
    """Returns the masks of chunks of `size` tokens, the last of which may be short."""
    short = -spans.number.shape[1] % size
    number = jnp.pad(spans.number, ((0, 0), (0, short)), mode="edge")
    number = number.reshape(len(number), 1, -1, size)
    after = number[..., -1]
    before = jnp.pad(after, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    pairs = (number[..., :, None] == number[..., None, :]) & jnp.tri(size, dtype=bool)
    return ChunkMasks(pairs, number == before[..., None], number == after[..., None], before == after)


def in_chunks(x: Array, size: int) -> Array:
    """Returns [B, T, N, ...] as [B, N, G, C, ...], zeros filling up the last chunk."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, size, *x.shape[2:])
    return jnp.moveaxis(x, 3, 1)


def out_of_chunks(x: Array, length: int) -> Array:
    """Returns [B, N, G, C, ...] as the first `length` tokens of [B, T, N, ...]."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

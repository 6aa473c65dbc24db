"""S_t = decay_t S_{t-1} + k_t v_t^T, read by y_t = q_t S_t: the recurrence behind linear attention, in three forms.

The decay is a number for each head, one for each of its keys' dimensions, or absent. All forms give the same values and
gradients; states are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.decay import LogDecay, cumulative, masked, within_spans
from transformer.models.spans import Spans, chunk_masks, in_chunks, out_of_chunks
from transformer.models.state_passing import run_over_parts
from transformer.parallel.parts import num_parts

DIRECT = 8
"""Up to so many tokens, pairs with a decay for each dimension are computed one by one."""

Decay = Float[Array, "B T N"] | Float[Array, "B T N H"] | None
Result = tuple[Float[Array, "B T N P"], Float[Array, "B N H P"]]
"""Outputs, zero for padding, and the last state."""
Form = Callable[..., Result]


def recurrent(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Decay,
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
) -> Result:
    """Goes from token to token."""
    state = empty_state(key, value) if state is None else state
    query, key, value = (masked(x, spans) for x in (query, key, value))
    decay = jnp.ones((1, key.shape[1], 1, 1)) if log_decay is None else jnp.exp(within_spans(log_decay, spans))
    decay = decay[..., None] if decay.ndim == 3 else decay

    def step(state: Array, this: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, decay, starts = this
        state = jnp.where(starts[:, None, None, None], 0.0, state)
        state = decay[..., None] * state + key[..., :, None] * value[..., None, :]
        return state, jnp.einsum("bnh,bnhp->bnp", query, state)

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, decay, spans.starts))
    state, output = jax.lax.scan(step, state, along)
    return jnp.moveaxis(output, 0, 1), state


def chunkwise(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Decay,
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
    chunk_length: int,
) -> Result:
    """Computes pairs within chunks of `chunk_length` tokens, all chunks at once, and goes from chunk to chunk by states.

    Yang et al. 2023 (arXiv:2312.06635), section 4; Dao & Gu 2024 (arXiv:2405.21060), section 6.
    """
    length, size = query.shape[1], min(chunk_length, query.shape[1])
    state = empty_state(key, value) if state is None else state
    masks = chunk_masks(spans, size)
    query, key, value = (in_chunks(masked(x, spans), size) for x in (query, key, value))
    enters, leaves = masks.enters[..., None], masks.leaves[..., None]
    carries = masks.carries[..., None, None].astype(jnp.float32)
    if log_decay is None:
        scores = jnp.where(masks.pairs, query @ key.mT, 0.0)
        entering, leaving = jnp.where(enters, query, 0.0), jnp.where(leaves, key, 0.0)
    else:
        total = cumulative(in_chunks(within_spans(log_decay, spans), size), axis=3)
        if log_decay.ndim == 3:
            scores = query @ key.mT * total[..., :, None].factor(total[..., None, :], masks.pairs)
            total = total[..., None]
        else:
            # XLA's CPU backend crashes on too many dimensions: heads and chunks become one.
            merged = jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]), (query, key, total))
            scores = _vector_scores(*merged).reshape(*query.shape[:4], size)
            scores = jnp.where(masks.pairs, scores, 0.0)
        last = total[:, :, :, -1:]
        entering, leaving = query * total.factor(mask=enters), key * last.factor(total, leaves)
        carries = carries * jnp.swapaxes(last.factor(), -1, -2)

    def step(state: Array, this: tuple[Array, Array]) -> tuple[Array, Array]:
        carries, added = this
        return carries * state + added, state

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (carries, leaving.mT @ value))
    state, states = jax.lax.scan(step, state, along)
    output = scores @ value + entering @ jnp.moveaxis(states, 0, 2)
    return out_of_chunks(output, length), state


def _vector_scores(query: Array, key: Array, total: LogDecay) -> Array:
    """Returns q_i (decays from j to i) k_j for i >= j, 0 or anything for others: [B, M, C, H] to [B, M, C, C].

    The later half of the tokens sees the earlier one through the decays up to the boundary between them, which are at
    most 1 on either side; each half is halved again, as if there were twice as many chunks.
    """
    count, size = query.shape[1:3]
    if size <= DIRECT:
        return _direct_scores(query, key, total)
    half = DIRECT
    while 2 * half < size:
        half *= 2
    if size != 2 * half:
        # Padding after the tokens: neither keys nor decays.
        wide = [(0, 0), (0, 0), (0, 2 * half - size), (0, 0)]
        query, key = jnp.pad(query, wide), jnp.pad(key, wide)
        total = jax.tree.map(lambda x: jnp.pad(x, wide, mode="edge"), total)
        return _vector_scores(query, key, total)[..., :size, :size]
    boundary = total[:, :, half - 1 : half]
    later = query[:, :, half:] * total[:, :, half:].factor(boundary)
    earlier = key[:, :, :half] * boundary.factor(total[:, :, :half])
    halves = jax.tree.map(lambda x: x.reshape(len(x), 2 * count, half, -1), (query, key, total))
    own = _vector_scores(*halves).reshape(-1, count, 2, half, half)
    upper = jnp.concatenate([own[:, :, 0], jnp.zeros_like(own[:, :, 0])], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([later @ earlier.mT, own[:, :, 1]], axis=-1)], axis=-2)


@jax.checkpoint
def _direct_scores(query: Array, key: Array, total: LogDecay) -> Array:
    """The same for few tokens, with a product for each of a head's dimensions, which is not kept for the gradient."""
    past = jnp.tri(query.shape[-2], dtype=bool)[:, :, None]
    factor = total[..., :, None, :].factor(total[..., None, :, :], past)
    return jnp.sum(query[..., :, None, :] * key[..., None, :, :] * factor, axis=-1)


def mix(
    config: ModelConfig,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Decay,
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
) -> Result:
    """Runs the recurrence in the form that `config` asks for."""
    return in_form(config, recurrent, chunkwise, query, key, value, log_decay, spans, state)


def in_form(
    config: ModelConfig, recurrent: Form, chunkwise: Form, query: Array, *others: Any, mixes_rows: bool = False
) -> Result:
    """Runs a recurrence token by token, by chunks, or, `parallel`, as one chunk, which computes every pair of tokens as
    attention does. One token always takes one step. `mixes_rows` is for `state_passing`, where devices have parts."""
    length = query.shape[1]
    *arrays, spans, state = others
    if state is None and num_parts(length) > 1:
        form = partial(in_form, config, recurrent, chunkwise)
        return run_over_parts(form, query, *arrays, spans=spans, mixes_rows=mixes_rows)
    if length == 1 or config.recurrence_form == "recurrent":
        return recurrent(query, *others)
    return chunkwise(query, *others, length if config.recurrence_form == "parallel" else config.chunk_length)


def empty_state(key: Float[Array, "B T N H"], value: Float[Array, "B T N P"]) -> Float[Array, "B N H P"]:
    """Returns the state before any token."""
    return jnp.zeros((key.shape[0], *key.shape[2:], value.shape[-1]), jnp.float32)

"""S_t = alpha_t (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T, read by y_t = q_t S_t: the gated delta rule.

A key's old value is taken out of the state before the new one is put in (Schlag et al. 2021, arXiv:2102.11174; with the
decay alpha, Yang et al. 2024, arXiv:2412.06464). Three forms that give the same values and gradients; states are float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.decay import cumulative, masked, within_spans
from transformer.models.linear_recurrence import Result, empty_state, in_form
from transformer.models.spans import Spans, chunk_masks, in_chunks, out_of_chunks
from transformer.models.triangular import unit_lower_inverse


def recurrent(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
) -> Result:
    """Goes from token to token."""
    state = empty_state(key, value) if state is None else state
    query, key, value, beta = (masked(x, spans) for x in (query, key, value, beta))
    decay = jnp.exp(within_spans(log_decay, spans))

    def step(state: Array, this: tuple[Array, ...]) -> tuple[Array, Array]:
        query, key, value, decay, beta, starts = this
        state = decay[..., None, None] * jnp.where(starts[:, None, None, None], 0.0, state)
        change = beta[..., None] * (value - jnp.einsum("bnh,bnhp->bnp", key, state))
        state = state + key[..., :, None] * change[..., None, :]
        return state, jnp.einsum("bnh,bnhp->bnp", query, state)

    along = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (query, key, value, decay, beta, spans.starts))
    state, output = jax.lax.scan(step, state, along)
    return jnp.moveaxis(output, 0, 1), state


def chunkwise(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
    chunk_length: int,
) -> Result:
    """Solves triangular systems within chunks of `chunk_length` tokens, all at once, and goes from chunk to chunk by states.

    With u_t = beta_t (v_t - alpha_t k_t S_{t-1}) the rule is S_t = alpha_t S_{t-1} + k_t u_t^T, a linear recurrence. In a
    chunk that begins with the state S, the u are a unit lower triangular system's solution, and linear in S: u = a - W S
    (the UT transform: Yang et al. 2024, arXiv:2406.06484, section 3; with decay arXiv:2412.06464, section 3.3).
    """
    length, size = query.shape[1], min(chunk_length, query.shape[1])
    state = empty_state(key, value) if state is None else state
    masks = chunk_masks(spans, size)
    query, key, value, beta = (in_chunks(masked(x, spans), size) for x in (query, key, value, beta))
    total = cumulative(in_chunks(within_spans(log_decay, spans), size), axis=3)
    pairs = total[..., :, None].factor(total[..., None, :], masks.pairs)
    since, last = total.factor(mask=masks.enters)[..., None], total[..., -1:]
    leaving = key * last.factor(total, masks.leaves)[..., None]
    carries = jnp.where(masks.carries[..., None], last.factor(), 0.0)[..., None]

    before = jnp.tri(size, k=-1) * pairs * (key @ key.mT) * beta[..., None]
    inverse = unit_lower_inverse(before.reshape(len(key), -1, size, size)).reshape(before.shape)
    changes, reads = inverse @ (beta[..., None] * value), inverse @ (beta[..., None] * since * key)

    def step(state: Array, this: tuple[Array, Array]) -> tuple[Array, Array]:
        transition, added = this
        return transition @ state + added, state

    transition = carries * jnp.eye(key.shape[-1]) - leaving.mT @ reads
    along = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (transition, leaving.mT @ changes))
    state, states = jax.lax.scan(step, state, along)
    states = jnp.moveaxis(states, 0, 2)
    output = (query @ key.mT * pairs) @ (changes - reads @ states) + (since * query) @ states
    return out_of_chunks(output, length), state


def mix(
    config: ModelConfig,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T N P"],
    log_decay: Float[Array, "B T N"],
    beta: Float[Array, "B T N"],
    spans: Spans,
    state: Float[Array, "B N H P"] | None,
) -> Result:
    """Runs the recurrence in the form that `config` asks for."""
    return in_form(config, recurrent, chunkwise, query, key, value, log_decay, beta, spans, state, mixes_rows=True)

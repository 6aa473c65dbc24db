"""Recurrences that are linear in their state, elementwise: all steps at once."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.models.recurrence import Steps
from transformer.parallel.parts import before, num_parts, on_parts
from transformer.parallel.sharding import partition_spec


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_recurrence(
    backwards: bool, decay: Float[Array, "T B W"], update: Float[Array, "T B W"]
) -> Float[Array, "T B W"]:
    """Returns h_t = decay_t h_(t-1) + update_t, from h = 0 before the first; in the other order if `backwards`.

    Where decays lie between 0 and 1 nothing can overflow, and no logarithms are needed: a product of many of them ends
    at 0, which is what is left of a state so long ago. The gradient is the same recurrence in the other order.
    """
    if num_parts(len(decay)) > 1:
        spec = partition_spec(("length", "batch", "state"), decay.shape, jax.sharding.get_abstract_mesh().shape)
        return on_parts(partial(_linear_part, backwards), (spec, spec), spec)(decay, update)
    all_at_once, in_turn = (partial(form, backwards) for form in (linear_all_at_once, linear_in_turn))
    return jax.lax.platform_dependent(decay, update, cpu=in_turn, default=all_at_once)


def linear_all_at_once(backwards: bool, decay: Array, update: Array) -> Float[Array, "T B W"]:
    """Computes `linear_recurrence` in O(log T) parallel steps (Blelloch 1990)."""

    def compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
        return second[0] * first[0], second[0] * first[1] + second[1]

    return jax.lax.associative_scan(compose, (decay, update), reverse=backwards)[1]


def linear_in_turn(backwards: bool, decay: Array, update: Array) -> Float[Array, "T B W"]:
    """Computes `linear_recurrence` in T steps: with few cores, a third of the time."""

    def body(hidden: Array, this: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden = this[0] * hidden + this[1]
        return hidden, hidden

    return jax.lax.scan(body, jnp.zeros_like(update[0]), (decay, update), reverse=backwards)[1]


def _linear_part(backwards: bool, decay: Array, update: Array) -> Float[Array, "T B W"]:
    """Computes a device's part of `linear_recurrence`, from the state that the devices before it end with."""
    first, last = (-1, 0) if backwards else (0, -1)

    def compose(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return later[0] * earlier[0], later[0] * earlier[1] + later[1]

    alone: Array = linear_recurrence(backwards, decay, update)
    _, state = before((jnp.prod(decay, axis=0), alone[last]), compose, backwards)
    return linear_recurrence(backwards, decay, update.at[first].add(decay[first] * state))


def _forward(backwards: bool, decay: Array, update: Array) -> Any:
    hidden = linear_recurrence(backwards, decay, update)
    return hidden, (decay, hidden)


def _backward(backwards: bool, residuals: Any, gradient: Array) -> Any:
    decay, hidden = residuals
    zero = jnp.zeros_like(decay[:1])

    def shifted(x: Array, earlier: bool) -> Array:
        return jnp.concatenate([x[1:], zero] if earlier else [zero, x[:-1]])

    total: Array = linear_recurrence(not backwards, shifted(decay, not backwards), gradient)
    return total * shifted(hidden, backwards), total


linear_recurrence.defvjp(_forward, _backward)


def min_gru(
    backwards: bool, inputs: Float[Array, "T B P"], state: Float[Array, "B W"], steps: Steps
) -> Float[Array, "T B W"]:
    """Returns the hidden states of minGRU (Feng et al. 2024, arXiv:2410.01201, section 3.1): gates see the input alone."""
    gate, candidate = jnp.split(inputs.astype(jnp.float32), 2, axis=-1)
    decay, update = jax.nn.sigmoid(-gate), jax.nn.sigmoid(gate) * candidate
    padding = (steps.segment_ids == 0)[:, :, None]
    decay = jnp.where(padding, 1, jnp.where(steps.starts[:, :, None], 0, decay))
    update = jnp.where(padding, 0, update)
    first = -1 if backwards else 0
    return linear_recurrence(backwards, decay, update.at[first].add(decay[first] * state))

"""Gated recurrences, step by step, with a gradient of their own; each step may read an encoder by additive attention.

Arrays lead with time, so that a step takes a slice that lies together. The loops hold nothing but what has to wait for
the step before: the gradients of all weights are products over all steps, after the loop.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from transformer.models.layers import as_rows

State = tuple[Array, ...]
"""Float32 arrays [B, W], of which the first is what a layer gives out."""


class Cell(NamedTuple):
    """A gated cell. Its preactivations are blocks of width W: the first from the input, the last from the state."""

    states: tuple[str, ...]
    num_inputs: int
    num_products: int
    num_blocks: int
    keeping_gate: int
    """Block of the gate that keeps the state, the bias of which starts at 1."""
    step: Callable[[State, Float[Array, "B P"]], State]


def lstm_step(state: State, preactivation: Float[Array, "B P"]) -> State:
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with a forget gate (Gers et al. 2000)."""
    _, cell = state
    write, keep, candidate, show = jnp.split(preactivation, 4, axis=-1)
    cell = jax.nn.sigmoid(keep) * cell + jax.nn.sigmoid(write) * jnp.tanh(candidate)
    return jax.nn.sigmoid(show) * jnp.tanh(cell), cell


def gru_step(state: State, preactivation: Float[Array, "B P"]) -> State:
    """Gated recurrent unit (Cho et al. 2014, arXiv:1406.1078v1), which resets the product with the state, as cuDNN does."""
    (hidden,) = state
    candidate, reset, keep, product = jnp.split(preactivation, 4, axis=-1)
    keep = jax.nn.sigmoid(keep)
    return (keep * hidden + (1 - keep) * jnp.tanh(candidate + jax.nn.sigmoid(reset) * product),)


CELLS = {
    "lstm": Cell(("hidden", "cell"), 4, 4, 4, 1, lstm_step),
    "gru": Cell(("hidden",), 3, 3, 4, 2, gru_step),
}


class Steps(NamedTuple):
    """What the tokens of each step are."""

    starts: Bool[Array, "T B"]
    """The first of a segment: the state before it is zero."""
    segment_ids: Int[Array, "T B"]
    """Segment 0 is padding: the state passes through."""


class Reader(NamedTuple):
    """What the state before each step reads, and how: softmax(v^T tanh(W s + U h)) over the states h of an encoder
    (Bahdanau et al. 2015, arXiv:1409.0473, section 3.1 and appendix A.1.2)."""

    query: Float[Array, "W A"]
    score: Float[Array, "A"]
    context: Float[Array, "D P"]
    """Maps what was read to the cell's input."""
    keys: Float[Array, "B S A"]
    values: Float[Array, "B S D"]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def recurrence(
    cell: Cell,
    backwards: bool,
    weights: Float[Array, "W P"],
    inputs: Float[Array, "T B Q"],
    state: State,
    steps: Steps,
    reader: Reader | None,
    source_segments: Int[Array, "B S"] | None,
) -> tuple[State, Float[Array, "T B W"], Float[Array, "T B D"] | None]:
    """Runs a cell over all steps, from the last to the first if `backwards`.

    `inputs` hold what each step's input adds to the preactivations. With a `reader`, the state before each step reads
    the tokens of its segment in the source, and what it read joins the input. Returns the last state, all hidden states,
    and what was read. The gradient keeps the weights of what was read, [T, B, S], and never a score's [T, B, S, A].
    """
    last, (hidden, context, _) = _forward(cell, backwards, weights, inputs, state, steps, reader, source_segments)
    return last, hidden, context


def _product(spec: str, left: Array, right: Array) -> Float[Array, "..."]:
    """Returns a product in the type of `right`, summed and given in float32 at least."""
    kind = jnp.promote_types(right.dtype, jnp.float32)
    return jnp.einsum(spec, left.astype(right.dtype), right, preferred_element_type=kind)


def _hidden_layer(query: Float[Array, "B A"], reader: Reader) -> Float[Array, "B S A"]:
    return jnp.tanh(query.astype(reader.keys.dtype)[:, None] + reader.keys)


def _read(query: Array, reader: Reader, visible: Bool[Array, "B S"]) -> Float[Array, "B S"]:
    """Returns the weights of a source's tokens; all are zero where nothing is visible."""
    logits = _product("bsa,a->bs", _hidden_layer(query, reader), reader.score)
    weights = jax.nn.softmax(jnp.where(visible, logits, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.where(visible, weights, 0)


def _forward(
    cell: Cell,
    backwards: bool,
    weights: Array,
    inputs: Array,
    state: State,
    steps: Steps,
    reader: Reader | None,
    source_segments: Array | None,
) -> Any:
    """Returns the last state, and of every step the hidden state, what was read, and what the gradient needs."""
    width, num_products = weights.shape
    weights = weights if reader is None else jnp.concatenate([weights, reader.query], axis=1)
    inside = (cell.num_blocks * width - inputs.shape[2], cell.num_blocks * width - num_products)

    def body(state: State, this: Any) -> Any:
        x, start, segments = this
        start, padding = start[:, None], (segments == 0)[:, None]
        product = jnp.where(start, 0, _product("bi,io->bo", state[0], weights))
        context = attention = query = None
        if reader is not None and source_segments is not None:
            product, query = product[:, :num_products], product[:, num_products:]
            visible = (segments[:, None] == source_segments) & (segments[:, None] != 0)
            attention = _read(query, reader, visible)
            context = _product("bs,bsd->bd", attention, reader.values)
            x = x + _product("bd,dp->bp", context, reader.context)
        # Blocks of input and of state overlap, but need not coincide.
        preactivation = jnp.pad(x, ((0, 0), (0, inside[0]))) + jnp.pad(product, ((0, 0), (inside[1], 0)))
        before = tuple(jnp.where(start, 0, part) for part in state)
        after = cell.step(before, preactivation)
        after = tuple(jnp.where(padding, old, new) for old, new in zip(state, after, strict=True))
        return after, (after[0], context, (before[1:], preactivation, query, attention))

    return jax.lax.scan(body, state, (inputs, *steps), reverse=backwards)


def _recurrence_forward(cell: Cell, backwards: bool, *arguments: Any) -> Any:
    last, (hidden, context, saved) = _forward(cell, backwards, *arguments)
    return (last, hidden, context), (arguments, hidden, context, saved)


def _recurrence_backward(cell: Cell, backwards: bool, residuals: Any, gradients: Any) -> Any:
    (weights, inputs, state, steps, reader, _), hidden, context, saved = residuals
    (width, num_products), num_inputs = weights.shape, inputs.shape[2]
    first_product = cell.num_blocks * width - num_products
    shifted = (hidden[1:], state[0][None]) if backwards else (state[0][None], hidden[:-1])
    previous = jnp.where(steps.starts[:, :, None], 0, jnp.concatenate(shifted))
    joint = (weights if reader is None else jnp.concatenate([weights, reader.query], axis=1)).T

    def body(carry: Any, this: Any) -> Any:
        later, totals = carry
        (start, segments), gradient, context_gradient, hidden, (rest, preactivation, query, attention) = this
        start, padding = start[:, None], (segments == 0)[:, None]
        later = (later[0] + gradient, *later[1:])
        _, pull = jax.vjp(cell.step, (hidden, *rest), preactivation)
        before, preactivation = pull(tuple(jnp.where(padding, 0, part) for part in later))
        x, product = preactivation[:, :num_inputs], preactivation[:, first_product:]
        if reader is not None:
            context_gradient = context_gradient + _product("bp,dp->bd", x, reader.context)
            of_attention = _product("bd,bsd->bs", context_gradient, reader.values)
            of_logits = attention * (of_attention - jnp.sum(attention * of_attention, axis=1, keepdims=True))
            tanh = _hidden_layer(query, reader).astype(of_logits.dtype)
            of_keys = of_logits[:, :, None] * reader.score * (1 - jnp.square(tanh))
            query = jnp.sum(of_keys, axis=1)
            totals = (totals[0] + of_keys, totals[1] + jnp.einsum("bs,bsa->a", of_logits, tanh))
            product = jnp.concatenate([product, query], axis=1)
        through = _product("bo,oi->bi", product, joint)
        before = (before[0] + through, *before[1:])
        earlier = tuple(
            jnp.where(padding, old, jnp.where(start, 0, new)) for old, new in zip(later, before, strict=True)
        )
        return (earlier, totals), (preactivation, query, context_gradient)

    # Gradients of what every step reads as it is: summed up on the way, since one step's are as large as their sum.
    totals: Any = ()
    if reader is not None:
        totals = tuple(jnp.zeros(x.shape, hidden.dtype) for x in (reader.keys, reader.score))
    last, of_hidden, of_context = gradients
    steps_back = (tuple(steps), of_hidden, of_context, previous, saved)
    (first, totals), (preactivations, queries, contexts) = jax.lax.scan(
        body, (last, totals), steps_back, reverse=not backwards
    )
    of_inputs = preactivations[..., :num_inputs].astype(inputs.dtype)
    of_weights = _over_steps(previous, preactivations[..., first_product:], weights)
    of_reader = None
    if reader is not None:
        of_reader = Reader(
            _over_steps(previous, queries, reader.query),
            totals[1].astype(reader.score.dtype),
            _over_steps(context, of_inputs, reader.context),
            totals[0].astype(reader.keys.dtype),
            jnp.einsum("tbs,tbd->bsd", saved[3], contexts).astype(reader.values.dtype),
        )
    return of_weights, of_inputs, first, None, of_reader, None


def _over_steps(left: Float[Array, "T B I"], right: Float[Array, "T B O"], weights: Array) -> Float[Array, "I O"]:
    """Returns the gradient of the weights of a product that is part of every step."""
    left, right = as_rows(left.astype(weights.dtype)), as_rows(right.astype(weights.dtype))
    dims = tuple(range(left.ndim - 1))
    kind = jnp.promote_types(weights.dtype, jnp.float32)
    return jax.lax.dot_general(left, right, ((dims, dims), ((), ())), preferred_element_type=kind).astype(weights.dtype)


recurrence.defvjp(_recurrence_forward, _recurrence_backward)

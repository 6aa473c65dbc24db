"""Gated recurrences: the gradient that is written out against that of a plain scan, in double precision; cells against Flax's."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from recurrences import SEGMENTS, SOURCE

from transformer.models.recurrence import CELLS, Reader, Steps, recurrence
from transformer.models.spans import spans_of


def random(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def plain(mixer, backwards, weights, inputs, state, steps, reader, source):
    """The same recurrence as a scan that JAX differentiates."""
    order = slice(None, None, -1 if backwards else 1)
    width = weights.shape[0]

    def body(state, this):
        x, start, segments = this
        before = tuple(jnp.where(start[:, None], 0, part) for part in state)
        context = None
        if reader is not None:
            scores = jnp.tanh((before[0] @ reader.query)[:, None] + reader.keys) @ reader.score
            seen = (source == segments[:, None]) & (segments[:, None] != 0)
            share = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e30)), 0)
            context = jnp.einsum("bs,bsd->bd", share, reader.values)
            x = x + context @ reader.context
        product = before[0] @ weights
        if mixer == "lstm":
            write, keep, candidate, show = jnp.split(x + product, 4, axis=1)
            cell = jax.nn.sigmoid(keep) * before[1] + jax.nn.sigmoid(write) * jnp.tanh(candidate)
            new = (jax.nn.sigmoid(show) * jnp.tanh(cell), cell)
        else:
            reset, keep = jnp.split(jax.nn.sigmoid(x[:, width:] + product[:, : 2 * width]), 2, axis=1)
            candidate = jnp.tanh(x[:, :width] + reset * product[:, 2 * width :])
            new = (keep * before[0] + (1 - keep) * candidate,)
        new = tuple(jnp.where(segments[:, None] == 0, old, part) for old, part in zip(state, new, strict=True))
        return new, (new[0], context)

    last, found = jax.lax.scan(body, state, jax.tree.map(lambda x: x[order], (inputs, *steps)))
    return last, *jax.tree.map(lambda x: x[order], found)


@pytest.mark.parametrize(
    ("mixer", "backwards", "reads"),
    [("lstm", False, True), ("lstm", True, False), ("gru", False, True), ("gru", True, False)],
)
def test_values_and_gradients_are_those_of_a_plain_scan(mixer, backwards, reads):
    cell, width, batch = CELLS[mixer], 6, len(SEGMENTS)
    order = slice(None, None, -1 if backwards else 1)
    num_inputs = cell.num_inputs * width
    read = (random(width, 5), random(5), random(7, num_inputs), random(*SOURCE.shape, 5), random(*SOURCE.shape, 7))
    with jax.enable_x64(True):
        segments = jnp.asarray(SEGMENTS.T, jnp.int32)
        starts = spans_of(segments[order].T, jnp.ones(batch, jnp.int32)).starts.T[order]
        assert np.sum(starts) == (6 if backwards else 5)  # segment 1 goes on
        steps, source = Steps(starts, segments), jnp.asarray(SOURCE, jnp.int32)
        reader = Reader(*map(jnp.asarray, read)) if reads else None
        state = tuple(jnp.asarray(random(batch, width, seed=number)) for number in range(len(cell.states)))
        weights, inputs = random(width, cell.num_products * width), random(*segments.shape, num_inputs)

        def loss(function, weights, inputs, state, reader):
            outputs = function(weights, inputs, state, steps, reader, source if reads else None)
            return sum(jnp.sum(jnp.cos(jnp.arange(x.size).reshape(x.shape)) * x) for x in jax.tree.leaves(outputs))

        def ours(*arguments):
            return recurrence(cell, backwards, *arguments)

        def theirs(*arguments):
            return plain(mixer, backwards, *arguments)

        results = [
            jax.jit(jax.value_and_grad(lambda *a, f=function: loss(f, *a), argnums=(0, 1, 2, 3)))(
                jnp.asarray(weights), jnp.asarray(inputs), state, reader
            )
            for function in (ours, theirs)
        ]
        for actual, expected in zip(*map(jax.tree.leaves, results), strict=True):
            assert actual.dtype == np.float64
            assert np.linalg.norm(expected) > 0 and np.linalg.norm(actual - expected) < 1e-12 * np.linalg.norm(expected)


def products(jaxpr: Any, times: int = 1) -> list[tuple[int, int]]:
    """Number of runs and size of the result of every matrix product of a program, and of those inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append((times, int(np.prod(equation.outvars[0].aval.shape))))
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            program = getattr(value, "jaxpr", value)
            found += products(program, inner) if hasattr(program, "eqns") else []
    return found


@pytest.mark.parametrize("mixer", ["lstm", "gru"])
def test_a_step_waits_for_one_product_and_weights_get_theirs_once(mixer):
    cell, width, batch, length = CELLS[mixer], 8, 2, 16
    segments = jnp.ones((length, batch), jnp.int32)
    steps = Steps(spans_of(segments.T).starts.T, segments)
    state = tuple(jnp.zeros((batch, width)) for _ in cell.states)
    inputs = jnp.zeros((length, batch, cell.num_inputs * width))

    def loss(weights):
        found: Any = recurrence(cell, False, weights, inputs, state, steps, None, None)
        return jnp.sum(found[1])

    weights = jnp.zeros((width, cell.num_products * width))
    found = products(jax.make_jaxpr(jax.grad(loss))(weights).jaxpr)
    assert sorted(found) == sorted([(1, weights.size), (length, batch * width), (length, batch * weights.shape[1])])


def test_cells_are_those_of_flax():
    """Gates in another order, and a bias in the GRU's product with the state, which ours does not have: zero."""
    width, batch = 4, 3
    x = jnp.asarray(random(batch, 5), jnp.float32)
    hidden, memory = (jnp.asarray(random(batch, width, seed=seed), jnp.float32) for seed in (2, 3))
    lstm = nnx.LSTMCell(5, width, rngs=nnx.Rngs(0))
    (expected_memory, expected), _ = lstm((memory, hidden), x)
    pairs = ((lstm.ii, lstm.hi), (lstm.if_, lstm.hf), (lstm.ig, lstm.hg), (lstm.io, lstm.ho))
    gates = [of_input(x) + of_state(hidden) for of_input, of_state in pairs]
    found, found_memory = CELLS["lstm"].step((hidden, memory), jnp.concatenate(gates, axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found_memory, expected_memory, rtol=1e-5, atol=1e-6)
    gru = nnx.GRUCell(5, width, rngs=nnx.Rngs(0))
    expected, _ = gru(hidden, x)
    reset, keep, candidate = jnp.split(gru.dense_i(x), 3, axis=1)
    of_reset, of_keep = jnp.split(hidden @ gru.dense_h.kernel[...][:, : 2 * width], 2, axis=1)
    product = hidden @ gru.dense_h.kernel[...][:, 2 * width :]
    preactivation = jnp.concatenate([candidate, reset + of_reset, keep + of_keep, product], axis=1)
    np.testing.assert_allclose(CELLS["gru"].step((hidden,), preactivation)[0], expected, rtol=1e-5, atol=1e-6)

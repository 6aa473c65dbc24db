"""Linear recurrences, all at once and in turn, against a loop in double precision; and minGRU made of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.models.elementwise_recurrence import linear_all_at_once, linear_in_turn, linear_recurrence


def random(*shape: int, seed: int = 1) -> Any:
    return np.random.default_rng(seed).standard_normal(shape)


def loop(decay: Any, update: Any) -> Any:
    outputs, hidden = [], np.zeros_like(update[0])
    for a, b in zip(decay, update, strict=True):
        hidden = a * hidden + b
        outputs.append(hidden)
    return np.stack(outputs)


@pytest.mark.parametrize("length", [1, 7, 64, 200])
@pytest.mark.parametrize("form", [linear_all_at_once, linear_in_turn])
def test_both_forms_are_a_loop(form, length):
    """With decays close to 1, to 0, and at both."""
    decay = 1 / (1 + np.exp(-6 * random(length, 2, 3)))
    decay[length // 2], decay[-1, 0] = 0, 1
    update = random(length, 2, 3, seed=2)
    run = jax.jit(form, static_argnums=0)
    for backwards, order in ((False, slice(None)), (True, slice(None, None, -1))):
        found = run(backwards, jnp.asarray(decay, jnp.float32), jnp.asarray(update, jnp.float32))
        np.testing.assert_allclose(found, loop(decay[order], update[order])[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_gradient_is_that_of_the_scan(backwards):
    decay = jax.nn.sigmoid(4 * jnp.asarray(random(9, 2, 3), jnp.float32)).at[4].set(0.0).at[6].set(1.0)
    update, gradient = (jnp.asarray(random(9, 2, 3, seed=seed), jnp.float32) for seed in (2, 3))

    @jax.jit
    def differentiated():
        functions = (partial(linear_recurrence, backwards), partial(linear_in_turn, backwards))
        return [jax.vjp(function, decay, update)[1](gradient) for function in functions]

    for actual, expected in zip(*differentiated(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [linear_all_at_once, linear_in_turn])
def test_a_long_text_is_forgotten_without_underflow_of_what_is_known(form):
    """Two hundred decays of a half are 0 in any float: neither the states nor their gradients may notice."""
    decay = jnp.full((200, 1, 1), 0.5)

    @jax.jit
    def differentiated(update):
        hidden, pull = jax.vjp(lambda update: form(False, decay, update), update)
        return hidden, pull(jnp.ones_like(decay))[0]

    hidden, gradient = differentiated(jnp.ones_like(decay))
    np.testing.assert_allclose(hidden[60:], 2.0, rtol=1e-6)
    np.testing.assert_allclose(gradient[:-60], 2.0, rtol=1e-6)

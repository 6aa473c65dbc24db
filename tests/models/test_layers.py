"""Norms, linear maps and dropout against their formulas in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.models.layers import (
    Linear,
    Norm,
    dropout,
    materialize,
)
from transformer.models.parameters import bind, parameter_specs

RNG = np.random.default_rng(0)


def config(**changes):
    return ModelConfig(vocab_size=16, width=24, num_heads=2, scan_layers=False, **changes)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_norms(norm, biases):
    module = Norm(config(norm=norm, biases=biases, norm_epsilon=1e-3))
    assert set(parameter_specs(module)) == ({"scale", "bias"} if biases and norm == "layernorm" else {"scale"})
    values = {name: RNG.standard_normal(24).astype(np.float32) for name in parameter_specs(module)}
    # The mean is large against the spread, where a variance from E[x^2] - E[x]^2 would lose its digits.
    x = (RNG.standard_normal((2, 5, 24)) + 100).astype(np.float32)
    exact = x.astype(np.float64)
    if norm == "layernorm":
        exact = exact - exact.mean(-1, keepdims=True)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-3) * values["scale"] + values.get("bias", 0)
    actual = bind(module, jax.tree.map(jnp.asarray, values))(jnp.asarray(x))
    np.testing.assert_allclose(actual, exact, rtol=1e-4, atol=1e-4)


def test_norm_of_zeros_is_finite_in_both_directions():
    module = bind(Norm(config(norm="rmsnorm")), {"scale": jnp.ones(24)})
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(module(x)))(jnp.zeros((1, 1, 24)))
    assert value == 0 and np.all(np.isfinite(gradient))


def test_norm_computes_in_float32_whatever_its_input():
    x = jnp.asarray(RNG.standard_normal((1, 3, 24)) * 1e-3 + 1, jnp.bfloat16)
    module = bind(Norm(config()), {"scale": jnp.ones(24)})
    assert module(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(module(x), module(x.astype(jnp.float32)).astype(jnp.bfloat16))


@pytest.mark.parametrize("biases", [False, True])
def test_linear(biases):
    module = Linear(config(biases=biases), (24, 7), ("embed", "mlp"))
    values = {name: RNG.standard_normal(spec.shape) for name, spec in parameter_specs(module).items()}
    x = RNG.standard_normal((2, 3, 24))
    actual = bind(module, jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), values))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(actual, x @ values["kernel"] + values.get("bias", 0), rtol=1e-5, atol=1e-5)
    assert ("bias" in values) == biases


def test_dropout_is_a_function_of_its_key():
    x = jnp.ones((64, 64))
    first, again, other = (dropout(x, 0.3, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.mean(first != other) > 0.2


def test_dropout_without_key_or_rate_does_nothing():
    x = jnp.ones((4, 4))
    assert dropout(x, 0.3, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_keeps_the_mean(dtype):
    dropped = dropout(jnp.ones((400, 400), dtype), 0.25, jax.random.key(0))
    assert dropped.dtype == dtype
    values = np.asarray(dropped, np.float64)
    assert np.mean(values == 0) == pytest.approx(0.25, abs=0.006)  # five standard deviations
    np.testing.assert_allclose(values[values != 0], 1 / 0.75, rtol=1e-6 if dtype == jnp.float32 else 2**-8)


def test_materialize_is_the_identity_in_both_directions():
    x = jnp.asarray(RNG.standard_normal((3, 4)), jnp.float32)
    value, backward = jax.vjp(jax.jit(lambda x: jnp.sin(materialize(jnp.cos(x)))), x)
    np.testing.assert_allclose(value, jnp.sin(jnp.cos(x)), rtol=1e-6)
    np.testing.assert_allclose(backward(value)[0], value * jnp.cos(jnp.cos(x)) * -jnp.sin(x), rtol=1e-5)

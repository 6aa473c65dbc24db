"""The loss contract: sums of parts add up, and one division makes the mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.objectives import normalize


def pair(value, weight):
    return jnp.float32(value), jnp.float32(weight)


def test_loss_is_the_sum_of_the_means():
    loss, means = normalize({"cross_entropy": pair(6, 4), "z_loss": pair(1, 2)})
    assert means == {"cross_entropy": 1.5, "z_loss": 0.5}
    assert loss == 2.0


def test_parts_over_the_weights_of_the_whole_add_up_to_the_whole():
    parts = [pair(3, 1), pair(0, 0), pair(10, 19)]
    whole = {"a": pair(13, 20)}
    weights = {"a": jnp.float32(20)}
    total = sum(float(normalize({"a": part}, weights)[0]) for part in parts)
    assert total == pytest.approx(float(normalize(whole)[0]), rel=1e-6)


def test_a_fractional_weight_is_divided_by_and_not_clipped_to_one():
    assert normalize({"a": pair(0.5, 0.25)})[0] == 2.0


def test_a_term_without_weight_is_zero_with_zero_gradient():
    def loss(x):
        return normalize({"a": (x * 0.0, jnp.float32(0)), "b": (x, jnp.float32(2))})[0]

    value, gradient = jax.value_and_grad(loss)(jnp.float32(3))
    np.testing.assert_array_equal([value, gradient], [1.5, 0.5])

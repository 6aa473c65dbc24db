"""The gated delta rule in its three forms against a loop in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import (
    CHUNK,
    FORMS_AND_LENGTHS,
    assert_close,
    assert_is_the_loop,
    random_case,
    reference,
    run_form,
)

from transformer.models.delta_rule import mix
from transformer.models.triangular import unit_lower_inverse


@pytest.mark.parametrize(("form", "length"), FORMS_AND_LENGTHS)
def test_each_form_is_the_loop_and_its_gradient(form, length):
    assert_is_the_loop(mix, form, random_case(length, "scalar", is_delta=True), CHUNK)


def test_equal_keys_without_decay_keep_the_last_value():
    """The worst case of the triangular system: all keys the same, and beta 1. The state then holds one value."""
    case = random_case(64, "scalar", is_delta=True)
    inputs = case.inputs | {"beta": np.ones_like(case.inputs["beta"])}
    inputs |= {"log_decay": np.zeros_like(inputs["log_decay"]), "state": np.zeros_like(inputs["state"])}
    inputs["key"] = np.broadcast_to(inputs["key"][:1, :1, :1], inputs["key"].shape)
    inputs["query"] = inputs["key"]
    case = case._replace(inputs=inputs)
    output, last, gradients = run_form(mix, "chunkwise", case, 64)
    seen = case.segment_ids != 0
    np.testing.assert_allclose(np.asarray(output)[seen], inputs["value"][seen], rtol=1e-4, atol=1e-4)
    _, expected_last, expected = reference(case)
    assert np.max(np.abs(gradients.pop("log_decay"))) < 1e-4  # nothing old is left that could decay: the sum is zero
    assert_close((last, gradients), (expected_last, {name: expected[name] for name in gradients}))


@pytest.mark.parametrize("size", [1, 5, 20, 64])
def test_inverse_of_triangles(size):
    rng = np.random.default_rng(size)
    lower = np.tril(rng.standard_normal((2, 3, size, size)), -1) / np.sqrt(size)
    ahead = rng.standard_normal(lower.shape)
    expected = np.linalg.inv(np.eye(size) + lower)

    def differentiated(lower, ahead):
        inverse, backward = jax.vjp(unit_lower_inverse, lower)
        return inverse, backward(ahead)[0]

    inputs = (jnp.asarray(x, jnp.float32) for x in (lower, ahead))
    inverse, gradient = jax.jit(differentiated)(*inputs)
    assert_close(inverse, expected)
    # d(L^-1) = -L^-1 dL L^-1, of the entries below the diagonal.
    exact = -np.swapaxes(expected, -1, -2) @ ahead @ np.swapaxes(expected, -1, -2)
    assert_close(gradient, np.tril(exact, -1))

"""Cross-entropy and z-loss against double precision, and their gradient against the textbook's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ObjectiveConfig
from transformer.models.transformer import MASKED_LOGIT, Outputs
from transformer.objectives import normalize
from transformer.objectives.causal import Causal
from transformer.objectives.cross_entropy import softmax_cross_entropy

RNG = np.random.default_rng(0)
LOGITS = 3 * RNG.standard_normal((2, 5, 11))
TARGETS = RNG.integers(0, 11, (2, 5)).astype(np.int32)
WEIGHTS = np.array([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], np.float32)


def terms(logits, z_loss=0.0, targets=TARGETS, weights=WEIGHTS, auxiliary=None):
    """The objective of a model whose logits are its hidden states."""
    hidden = jnp.asarray(logits, jnp.float32)
    outputs = Outputs(hidden, lambda hidden: hidden, auxiliary or {})
    batch = {"targets": jnp.asarray(targets), "weights": jnp.asarray(weights)}
    return Causal().terms(ObjectiveConfig(z_loss=z_loss), outputs, batch)


def reference():
    normalizer = np.log(np.exp(LOGITS).sum(-1))
    return normalizer - np.take_along_axis(LOGITS, TARGETS[..., None], -1)[..., 0], normalizer


def test_cross_entropy_and_normaliser():
    expected = reference()
    actual = softmax_cross_entropy(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(TARGETS))
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_terms_are_weighted_sums():
    cross_entropy, normalizer = reference()
    found = terms(LOGITS, z_loss=0.01)
    assert set(found.losses) == {"cross_entropy", "z_loss"}
    for name, values in (("cross_entropy", cross_entropy), ("z_loss", 0.01 * normalizer**2)):
        value, weight = found.losses[name]
        assert weight == 4
        np.testing.assert_allclose(value, np.sum(values * WEIGHTS), rtol=1e-5)
    correct, weight = found.measures["accuracy"]
    assert correct == np.sum((LOGITS.argmax(-1) == TARGETS) * WEIGHTS) and weight == 4


def test_z_loss_is_absent_unless_asked_for_and_auxiliary_terms_are_kept():
    assert set(terms(LOGITS).losses) == {"cross_entropy"}
    balance = (jnp.float32(3), jnp.float32(2))
    found = terms(LOGITS, auxiliary={"balance": balance})
    assert found.auxiliary == {"balance": balance} and "balance" not in found.losses
    mean = reference()[0][WEIGHTS > 0].mean()
    assert normalize(found.losses | found.auxiliary)[0] == pytest.approx(mean + 1.5, rel=1e-5)


def test_gradient_is_the_textbooks():
    gradient = jax.grad(lambda logits: normalize(terms(logits, z_loss=0.01).losses)[0])(
        jnp.asarray(LOGITS, jnp.float32)
    )
    _, normalizer = reference()
    softmax = np.exp(LOGITS - normalizer[..., None])
    expected = softmax - np.eye(11)[TARGETS] + 0.02 * normalizer[..., None] * softmax
    np.testing.assert_allclose(gradient, expected * WEIGHTS[..., None] / 4, rtol=1e-4, atol=1e-6)


def test_what_has_no_weight_has_no_influence():
    other = np.where(WEIGHTS[..., None] > 0, LOGITS, -LOGITS)
    targets = np.where(WEIGHTS > 0, TARGETS, 0)
    assert normalize(terms(other, 0.01, targets).losses)[0] == normalize(terms(LOGITS, 0.01).losses)[0]


def test_a_batch_without_weight_has_loss_and_gradient_zero():
    nothing = np.zeros_like(WEIGHTS)
    value, gradient = jax.value_and_grad(lambda logits: normalize(terms(logits, 0.01, weights=nothing).losses)[0])(
        jnp.asarray(LOGITS, jnp.float32)
    )
    assert value == 0 and np.all(gradient == 0)


def test_large_logits_and_masked_columns_are_finite():
    logits = 1e4 * LOGITS
    logits[..., 9:] = MASKED_LOGIT
    targets = TARGETS % 9
    loss, gradient = jax.value_and_grad(lambda x: normalize(terms(x, targets=targets).losses)[0])(
        jnp.asarray(logits, jnp.float32)
    )
    best = logits.max(-1) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    assert loss == pytest.approx(best[WEIGHTS > 0].mean(), rel=1e-5)
    assert np.all(np.isfinite(gradient)) and np.all(gradient[..., 9:] == 0)

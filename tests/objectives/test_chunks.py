"""Losses whose logits are computed a chunk at a time against those of all at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, ConfigError, ModelConfig, ObjectiveConfig, replace, validate
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer, apply
from transformer.objectives import normalize
from transformer.objectives.causal import Causal
from transformer.objectives.multi_token import MultiToken

LENGTH = 21
RNG = np.random.default_rng(0)
ARRAYS = {
    "inputs": RNG.integers(0, 50, (2, LENGTH), np.int32),
    "targets": RNG.integers(0, 50, (2, LENGTH), np.int32),
    "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH)),
    "segment_ids": np.ones((2, LENGTH), np.int32),
    "weights": (RNG.random((2, LENGTH)) < 0.7).astype(np.float32),
}
BATCH = jax.tree.map(jnp.asarray, ARRAYS)


def loss_of(objective: Any, size: int, **model: Any) -> Any:
    """Loss, terms and gradients, with logits of `size` tokens at a time."""
    shape: Any = {"vocab_size": 50, "num_layers": 1, "width": 16, "num_heads": 2, "scan_layers": False}
    network = Transformer(ModelConfig(**shape | model))
    params = init_parameters(network, jax.random.key(0))
    config = ObjectiveConfig(z_loss=0.01, label_smoothing=0.1, logit_chunk=size)

    def loss(params: Any) -> Any:
        found = objective.terms(config, apply(network, params, BATCH), BATCH)
        return normalize(found.losses)[0], found

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def close(found: Any, expected: Any, rtol: float = 0.0, atol: float = 0.0) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=atol)


@pytest.mark.parametrize("size", [1, 7, 8, 20, 21, 64])
def test_loss_terms_and_gradients_are_those_of_all_at_once(size: int) -> None:
    (loss, terms), gradients = loss_of(Causal(), size)
    (expected, expected_terms), expected_gradients = loss_of(Causal(), 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(terms.losses) == {"cross_entropy", "z_loss", "label_smoothing"}
    close(terms, expected_terms, rtol=2e-6)
    close(gradients, expected_gradients, atol=1e-6)


@pytest.mark.slow
def test_heads_for_further_tokens_go_by_chunks_too() -> None:
    (loss, terms), gradients = loss_of(MultiToken(), 8, num_future_tokens=2)
    (expected, expected_terms), expected_gradients = loss_of(MultiToken(), 0, num_future_tokens=2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert "future_2" in terms.losses
    close(terms, expected_terms, rtol=2e-6)
    close(gradients, expected_gradients, atol=1e-6)


def test_logits_never_exist_in_full() -> None:
    """A vocabulary so large that nothing else counts: temporaries shrink with the chunk."""
    network = Transformer(ModelConfig(vocab_size=20_000, num_layers=1, width=8, num_heads=1, scan_layers=False))
    params = jax.eval_shape(lambda: init_parameters(network, jax.random.key(0)))
    length = 512
    batch = {name: jax.ShapeDtypeStruct((1, length), array.dtype) for name, array in ARRAYS.items()}

    def temporaries(size: int) -> int:
        def loss(params: Any, batch: Any) -> Any:
            terms = Causal().terms(ObjectiveConfig(logit_chunk=size), apply(network, params, batch), batch)
            return normalize(terms.losses)[0]

        memory: Any = jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis()
        return memory.temp_size_in_bytes

    logits = 4 * length * 20_000
    assert temporaries(0) > logits and temporaries(64) < logits / 2


def test_a_chunk_is_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"objective\.logit_chunk = -1"):
        validate(replace(Config(), objective={"logit_chunk": -1}))

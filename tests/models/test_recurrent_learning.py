"""What recurrent networks learn in a minute: to write a text backwards by reading it, and to repeat one from memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import ModelConfig
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer, apply

START, LETTERS, ROWS = 9, 9, 32


def batch_of(inputs: np.ndarray, source: np.ndarray | None) -> dict[str, jax.Array]:
    arrays = {"inputs": inputs} | ({} if source is None else {"encoder_inputs": source})
    for name, array in list(arrays.items()):
        prefix = name.removesuffix("inputs")
        arrays[f"{prefix}positions"] = np.broadcast_to(np.arange(array.shape[1]), array.shape)
        arrays[f"{prefix}segment_ids"] = np.ones_like(array)
    return {name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def trained(config: ModelConfig, make: Any, num_steps: int) -> tuple[float, float]:
    """Returns the accuracy on the first batch, and that on the last twenty, each seen before it is learned from."""
    model = Transformer(config)
    params = init_parameters(model, jax.random.key(0))
    optimizer, generator = optax.adam(1e-2), np.random.default_rng(0)

    def loss_of(params, batch, targets, weights):
        outputs = apply(model, params, batch)
        logits = outputs.logits(outputs.hidden)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = jnp.argmax(logits, axis=-1) == targets
        return jnp.sum(losses * weights) / jnp.sum(weights), jnp.sum(right * weights) / jnp.sum(weights)

    @jax.jit
    def step(params, state, batch, targets, weights):
        (_, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch, targets, weights)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, accuracy

    state, accuracies = optimizer.init(params), []
    for _ in range(num_steps):
        params, state, accuracy = step(params, state, *make(generator))
        accuracies.append(float(accuracy))
    return accuracies[0], float(np.mean(accuracies[-20:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "cross_attention"), [("gru", "bahdanau"), ("lstm", "bahdanau"), ("gru", "luong"), ("lstm", "attention")]
)
def test_a_text_is_written_backwards(layers: str, cross_attention: Any) -> None:
    """States begin at zero in the decoder, so that all it knows of the source it has read."""
    shape: dict[str, Any] = {"num_layers": 1, "width": 32, "num_heads": 2, "positions": "none", "scan_layers": False}
    reads: dict[str, Any] = {"architecture": "encoder_decoder", "cross_attention": cross_attention}
    config = ModelConfig(vocab_size=LETTERS + 1, layers=f"{layers}/none", initial_scale=0.2, **shape, **reads)

    def make(generator):
        source = generator.integers(0, LETTERS, (ROWS, 8))
        targets = source[:, ::-1]
        inputs = np.concatenate([np.full((ROWS, 1), START), targets[:, :-1]], axis=1)
        return batch_of(inputs, source), jnp.asarray(targets), jnp.ones(targets.shape)

    first, last = trained(config, make, 500)
    assert first < 0.3 and last > 0.9, (first, last)


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["lstm", "gru"])
def test_a_text_is_repeated_from_memory(layers: str) -> None:
    shape: dict[str, Any] = {"num_layers": 1, "width": 64, "num_heads": 2, "positions": "none", "scan_layers": False}
    config = ModelConfig(vocab_size=LETTERS + 1, layers=f"{layers}/none", initial_scale=0.2, **shape)

    def make(generator):
        text = generator.integers(0, LETTERS, (ROWS, 3))
        row = np.concatenate([text, np.full((ROWS, 1), START), text], axis=1)
        weights = jnp.ones((ROWS, 6)).at[:, :3].set(0.0)
        return batch_of(row[:, :-1], None), jnp.asarray(row[:, 1:]), weights

    first, last = trained(config, make, 600)
    assert first < 0.3 and last > 0.95, (first, last)

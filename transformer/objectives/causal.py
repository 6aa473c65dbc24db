"""Causal language modelling: each token from those before it."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import ObjectiveConfig
from transformer.models.transformer import Outputs
from transformer.objectives.terms import Terms


def causal(config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
    """Returns the cross-entropy of `targets` in nats, weighted by `weights`, and the z-loss where it is on.

    The z-loss, log^2 of the softmax's normaliser, is that of Chowdhery et al. (2022), arXiv:2204.02311, section 5.
    """
    weights = batch["weights"]
    logits = outputs.logits(outputs.hidden)
    cross_entropy, normalizer = softmax_cross_entropy(logits, batch["targets"])
    total = jnp.sum(weights)
    losses = {"cross_entropy": (jnp.sum(cross_entropy * weights), total)}
    if config.z_loss:
        losses["z_loss"] = (config.z_loss * jnp.sum(jnp.square(normalizer) * weights), total)
    correct = (jnp.argmax(logits, axis=-1) == batch["targets"]).astype(jnp.float32)
    return Terms(losses | outputs.auxiliary, {"accuracy": (jnp.sum(correct * weights), total)})


def softmax_cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns -log softmax(logits)[target] and the log of the softmax's normaliser."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: its gradient is a fused elementwise product and not a scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return normalizer - jnp.sum(jnp.where(is_target, logits, 0), axis=-1), normalizer

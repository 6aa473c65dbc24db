"""The loss of most objectives: cross-entropy of targets, token by token."""

import importlib
from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import ObjectiveConfig
from transformer.models.transformer import MASKED_LOGIT, Outputs
from transformer.objectives.objective import Objective
from transformer.objectives.terms import Terms


class TokenObjective(Objective):
    """An objective whose terms are those of the targets of its examples."""

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        return token_terms(config, outputs, batch)


def token_terms(config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
    """Returns the cross-entropy of `targets` in nats, weighted by `weights`, and the z-loss where it is on.

    The z-loss, log^2 of the softmax's normaliser, is that of Chowdhery et al. (2022), arXiv:2204.02311, section 5. Label
    smoothing (Szegedy et al. 2016, arXiv:1512.00567, section 7) is a term of its own: what the even part of the target
    distribution adds to the cross-entropy, which stays that of the targets alone.
    """
    total = jnp.sum(batch["weights"])
    sums = target_sums(config, outputs, outputs.hidden, batch["targets"], batch["weights"])
    terms = {name: (value, total) for name, value in sums.items()}
    measures = {"accuracy": terms.pop("accuracy")}
    return Terms(terms, measures, outputs.statistics, outputs.auxiliary)


def target_sums(
    config: ObjectiveConfig, outputs: Outputs, hidden: Float[Array, "B T D"], *targets_and_weights: Array
) -> dict[str, Float[Array, ""]]:
    """Returns the sum over targets, each with its weight, of each loss and of those that are most probable."""
    sums = partial(_sums, config, outputs)
    if config.logit_chunk:
        sums = importlib.import_module("transformer.objectives.chunks").in_chunks(sums, config.logit_chunk)
    return sums(hidden, *targets_and_weights)


def _sums(
    config: ObjectiveConfig, outputs: Outputs, hidden: Array, targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> dict[str, Float[Array, ""]]:
    logits = outputs.logits(hidden)
    cross_entropy, normalizer = softmax_cross_entropy(logits, targets)
    losses = {"cross_entropy": cross_entropy}
    if config.z_loss:
        losses["z_loss"] = config.z_loss * jnp.square(normalizer)
    if config.label_smoothing:
        # Columns beyond the vocabulary have no share of the even part.
        is_token = logits > MASKED_LOGIT
        even = normalizer - jnp.sum(jnp.where(is_token, logits, 0), axis=-1) / jnp.sum(is_token, axis=-1)
        losses["label_smoothing"] = config.label_smoothing * (even - cross_entropy)
    losses["accuracy"] = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return {name: jnp.sum(value * weights) for name, value in losses.items()}


def softmax_cross_entropy(
    logits: Float[Array, "B T V"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns -log softmax(logits)[target] and the log of the softmax's normaliser."""
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A comparison instead of a gather: its gradient is a fused elementwise product and not a scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    return normalizer - jnp.sum(jnp.where(is_target, logits, 0), axis=-1), normalizer

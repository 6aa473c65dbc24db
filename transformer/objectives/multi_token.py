"""Prediction of several tokens: the next one, and by further heads those after it (DeepSeek-V3, arXiv:2412.19437,
section 2.2)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from transformer.config import ObjectiveConfig
from transformer.models.transformer import Outputs
from transformer.objectives.cross_entropy import target_sums, token_terms
from transformer.objectives.objective import Objective
from transformer.objectives.terms import Terms


class MultiToken(Objective):
    """The next token, and those after it."""

    COUNTS_TEXT = True

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        """Returns the terms of the next token, and `future_k`, the cross-entropy of the k-th after that.

        A token counts as far as it, and all before it, belong to the document. The further terms together weigh
        `future_weight`.
        """
        assert outputs.future is not None, "validated: model.num_future_tokens > 0"
        found = token_terms(config, outputs, batch)
        states, own = outputs.future(batch["targets"])
        weights = batch["weights"]
        losses, measures = dict(found.losses), dict(found.measures)
        for number, hidden in enumerate(states, start=1):
            # Of the row's last tokens nothing further is known.
            is_inside = jnp.arange(weights.shape[1]) < weights.shape[1] - number
            weights = weights * jnp.roll(batch["weights"], -number, axis=1) * is_inside
            sums = target_sums(config, outputs, hidden, jnp.roll(batch["targets"], -number, axis=1), weights)
            total = jnp.sum(weights)
            share = config.future_weight / len(states)
            losses[f"future_{number}"] = (share * sums["cross_entropy"], total)
            measures[f"future_{number}_accuracy"] = (sums["accuracy"], total)
        statistics, auxiliary = found.statistics | own.get("statistics", {}), found.auxiliary | own.get("losses", {})
        return Terms(losses, measures, statistics, auxiliary)

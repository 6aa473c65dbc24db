"""Text to text: every task is a text to write about another, a class its word (Raffel et al. 2020, arXiv:1910.10683)."""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from transformer.config import ObjectiveConfig
from transformer.models.transformer import Outputs
from transformer.objectives.cross_entropy import TokenObjective
from transformer.objectives.terms import Terms


class TextToText(TokenObjective):
    """A text from another, which begins with the words for its task.

    `exact_match` is the share of texts whose every token is the most probable one after those before it. These are the
    texts that greedy search writes exactly as they are given, so that none has to be written to know it.
    """

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        terms = super().terms(config, outputs, batch)
        segments, counts = batch["segment_ids"], batch["weights"] > 0
        wrong = (jnp.argmax(outputs.logits(outputs.hidden), axis=-1) != batch["targets"]) & counts
        same = segments[:, :, None] == segments[:, None, :]
        begins = counts & (batch["positions"] == 0)
        exact = begins & ~jnp.any(same & wrong[:, None, :], axis=-1)
        terms.measures["exact_match"] = (jnp.sum(exact, dtype=jnp.float32), jnp.sum(begins, dtype=jnp.float32))
        return terms

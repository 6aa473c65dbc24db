"""Sequence classification: one class for each text, or pair of texts, as in sentiment analysis and entailment."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from transformer.config import Config, ObjectiveConfig
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.models.transformer import Outputs
from transformer.objectives.cross_entropy import TokenObjective
from transformer.objectives.pooling import pooled, told
from transformer.objectives.scores import classification_scores
from transformer.objectives.terms import Terms


class Classification(TokenObjective):
    """A class for each text, or for each word, told at one of its tokens."""

    def scores(self, config: Config, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns what `classification_scores` does, over all that has a class."""
        counts = predictions["weights"] > 0
        predicted, targets = (predictions[name][counts] for name in ("predicted", "targets"))
        return classification_scores(predicted, targets, config.model.num_labels)

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        terms = super().terms(config, outputs, batch)
        predicted = jnp.argmax(outputs.logits(outputs.hidden), axis=-1)
        terms.predictions.update(predicted=predicted, targets=batch["targets"], weights=batch["weights"])
        return terms


class SequenceClassification(Classification):
    """A class for each text."""

    UNIT = "text"

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        return super().terms(config, pooled(config, outputs, batch), batch)

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of texts with the class of each as the target of one of its tokens."""
        row = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        return row | {"targets": window["labels"], "weights": told(config, window)}

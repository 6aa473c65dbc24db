"""Regression: a number for each text, or pair of texts, as in the similarity of sentences; the loss is the squared error."""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from transformer.config import Config, ObjectiveConfig
from transformer.data.batches import token_arrays
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.models.transformer import Outputs
from transformer.objectives.objective import Objective
from transformer.objectives.pooling import pooled, told
from transformer.objectives.scores import regression_scores
from transformer.objectives.terms import Terms


class Regression(Objective):
    """A number for each text, told at one of its tokens or by the mean of all."""

    UNIT = "text"

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        predicted = outputs.logits(pooled(config, outputs, batch).hidden)[..., 0]
        error = jnp.sum(jnp.square(predicted - batch["targets"]) * batch["weights"])
        terms = Terms({"squared_error": (error, jnp.sum(batch["weights"]))}, {}, outputs.statistics, outputs.auxiliary)
        terms.predictions.update(predicted=predicted, targets=batch["targets"], weights=batch["weights"])
        return terms

    def scores(self, config: Config, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        counts = predictions["weights"] > 0
        return regression_scores(*(predictions[name][counts] for name in ("predicted", "targets")))

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of texts with the number of each as the target of one of its tokens."""
        row = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        return row | {"targets": window["labels"], "weights": told(config, window)}

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        return token_arrays(config.data.sequence_length) | {"targets": (config.data.sequence_length, "float32")}

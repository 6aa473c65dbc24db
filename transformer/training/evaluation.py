"""Validation: the objective's terms summed over the validation split."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.config import Config
from transformer.data.batches import validation_batches
from transformer.data.prepared import Prepared
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of
from transformer.parallel.sharding import global_array, local_rows, replicated
from transformer.training.step import make_terms


class Evaluator:
    """The compiled evaluation of one model; called with parameters as often as needed."""

    def __init__(self, config: Config, prepared: Prepared, model: Transformer, mesh: Mesh):
        self._config, self._prepared, self._mesh, self._objective = config, prepared, mesh, objective_of(config)
        self._batch_size = config.evaluation.batch_size or config.train.batch_size
        self._rows = local_rows(mesh, self._batch_size)
        self._sums = jax.jit(make_terms(config, model), out_shardings=replicated(mesh))

    def batches(self) -> Iterator[dict[str, Any]]:
        """Yields the global batches of the validation split, in order."""
        for local in validation_batches(self._config, self._prepared, self._rows):
            yield global_array(self._mesh, self._rows, self._batch_size, local)

    def __call__(self, params: Tree, interrupted: Callable[[], int] = lambda: 0) -> dict[str, Any]:
        """Returns loss, the mean of each term and measure, tokens, bits a byte of the text, and the objective's scores.

        `interrupted` is asked after each batch; an answer other than 0 comes back at once as `interrupted_by`.
        Sums are added up in double precision on the host, batch after batch, so that their order is fixed.
        """
        losses: dict[str, list[float]] = {}
        measures: dict[str, list[float]] = {}
        predictions: dict[str, list[np.ndarray]] = {}
        for batch in self.batches():
            terms = self._sums(params, batch)
            reported = terms.measures | terms.statistics | terms.auxiliary
            for totals, found in ((losses, terms.losses), (measures, reported)):
                for name, (value, weight) in jax.device_get(found).items():
                    total = totals.setdefault(name, [0.0, 0.0])
                    total[0] += float(value)
                    total[1] += float(weight)
            for name, values in jax.device_get(terms.predictions).items():
                predictions.setdefault(name, []).append(values)
            if reason := interrupted():
                return {"interrupted_by": reason}
        means = {name: value / max(weight, 1) for name, (value, weight) in (losses | measures).items()}
        result = {"loss": sum(means[name] for name in losses), **means}
        result["tokens"] = int(losses[min(losses)][1])  # whatever is learned from: of texts with a number, these
        if "cross_entropy" in losses and self._objective.COUNTS_TEXT:
            splits = [source.validation for source in self._prepared.sources]
            tokens_per_byte = sum(split.num_tokens for split in splits) / sum(split.num_bytes for split in splits)
            result["bits_per_byte"] = means["cross_entropy"] / math.log(2) * tokens_per_byte
        return result | self._objective.scores(self._config, {n: np.concatenate(v) for n, v in predictions.items()})

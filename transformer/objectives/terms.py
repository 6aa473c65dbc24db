"""The loss contract: named terms as (sum, weight), normalised once."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Pair = tuple[Float[Array, ""], Float[Array, ""]]


@dataclass(frozen=True)
class Terms:
    """The terms of one batch, or of a part of one; sums and weights of the parts add up to those of the whole.

    A weight must depend on the batch alone and not on the parameters: the step takes the weights of the
    whole batch before it differentiates any microbatch.
    """

    losses: dict[str, Pair]
    """Terms whose means add up to the objective's loss."""
    measures: dict[str, Pair] = field(default_factory=dict)
    """What is reported at validation and never differentiated."""
    statistics: dict[str, Pair] = field(default_factory=dict)
    """What costs next to nothing and is reported at every step, such as the model's own."""
    auxiliary: dict[str, Pair] = field(default_factory=dict)
    """Terms of the model's own, which are added to the loss where it learns and are no part of it at validation."""
    predictions: dict[str, Array] = field(default_factory=dict)
    """Arrays [B, ...] from which the objective's `scores` are told, once those of all batches are known."""


jax.tree_util.register_dataclass(Terms, ["losses", "measures", "statistics", "auxiliary", "predictions"], [])


def normalize(
    terms: Mapping[str, Pair], weights: Mapping[str, Float[Array, ""]] | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss and the mean of each term: the one place where a sum is divided by a weight.

    `weights` are those of the whole batch when `terms` are of a part of it. A term without weight is 0.
    """
    totals = {name: weight for name, (_, weight) in terms.items()} if weights is None else weights
    means = {name: value / jnp.where(totals[name] == 0, 1, totals[name]) for name, (value, _) in terms.items()}
    return jnp.sum(jnp.stack(list(means.values()))), means

"""What an objective is, and the loss contract: named terms as (sum, weight), normalised once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.config import Config, ObjectiveConfig
from transformer.data.tokenizers import Tokenizer
from transformer.models.transformer import Outputs

Pair = tuple[Float[Array, ""], Float[Array, ""]]
Row = dict[str, np.ndarray]
"""The arrays of one row of a batch, each [up to its length]."""


@dataclass(frozen=True)
class Terms:
    """The terms of one batch, or of a part of one; sums and weights of the parts add up to those of the whole.

    A weight must depend on the batch alone and not on the parameters: the step takes the weights of the
    whole batch before it differentiates any microbatch.
    """

    losses: dict[str, Pair]
    """Terms whose means add up to the loss."""
    measures: dict[str, Pair] = field(default_factory=dict)
    """What is reported at validation and never differentiated."""
    statistics: dict[str, Pair] = field(default_factory=dict)
    """What costs next to nothing and is reported at every step, such as the model's own."""


jax.tree_util.register_dataclass(Terms, ["losses", "measures", "statistics"], [])


@runtime_checkable
class Objective(Protocol):
    """A module of this package: how text becomes examples, and outputs become terms; nothing else."""

    DATA: Literal["text", "pairs", "labelled"]
    """What its examples are made from: windows of text, pairs of texts, or texts with labels."""
    COUNTS_TEXT: bool
    """Whether the cross-entropy is over every token of the text once, so that bits a byte can be told."""

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        """Returns the terms of a batch, the model's own among them."""
        ...

    def example(self, config: Config, tokenizer: Tokenizer, window: Row, rng: np.random.Generator) -> Row:
        """Returns the row that a window becomes. `data.shards.Split.window` says what a window of text is."""
        ...

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        """Returns length and NumPy type of every array of a row."""
        ...

    def window_length(self, config: Config) -> int:
        """Returns how many tokens of text fill an example."""
        ...

    def num_extra_tokens(self, config: Config) -> int:
        """Returns how many tokens the objective adds: they have the numbers from the tokenizer's `vocab_size` on."""
        ...


def token_arrays(length: int) -> dict[str, tuple[int, str]]:
    """Returns the arrays of a decoder, or of an encoder alone."""
    return {name: (length, "int32") for name in ("inputs", "targets", "positions", "segment_ids")} | {
        "weights": (length, "float32")
    }


def encoder_arrays(length: int) -> dict[str, tuple[int, str]]:
    """Returns what an encoder-decoder reads."""
    return {f"encoder_{name}": (length, "int32") for name in ("inputs", "positions", "segment_ids")}


def normalize(
    terms: Mapping[str, Pair], weights: Mapping[str, Float[Array, ""]] | None = None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss and the mean of each term: the one place where a sum is divided by a weight.

    `weights` are those of the whole batch when `terms` are of a part of it. A term without weight is 0.
    """
    totals = {name: weight for name, (_, weight) in terms.items()} if weights is None else weights
    means = {name: value / jnp.where(totals[name] == 0, 1, totals[name]) for name, (value, _) in terms.items()}
    return jnp.sum(jnp.stack(list(means.values()))), means

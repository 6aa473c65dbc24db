"""What an objective is, and what of it the pipeline of batches is given."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Array

from transformer.config import Config, ObjectiveConfig, source_length
from transformer.data.batches import token_arrays
from transformer.data.prepared import Prepared
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.models.transformer import Outputs
from transformer.objectives.terms import Terms


class Objective:
    """How text becomes examples, and outputs become terms; as it stands, an example is a window."""

    UNIT: ClassVar[str] = "token"
    """What the loss is a mean over, and a validation counts."""
    COUNTS_TEXT: ClassVar[bool] = False
    """Whether the cross-entropy is over every token of the text once, so that bits a byte can be told."""
    HAS_REFERENCE: ClassVar[bool] = False
    """Whether the examples have a `reference`, which the model that a run begins with decides."""

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        """Returns the terms of a batch, the model's own among them."""
        raise NotImplementedError

    def scores(self, config: Config, predictions: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Returns what is told of all predictions of a split together, those of its batches one after another."""
        return {}

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the arrays of the row that a window becomes, each up to its length.

        `data.shards.Split.window` says what a window of text is, `data.rows.RowSplit.window` what one of examples is.
        """
        return window

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        """Returns length and NumPy type of every array of a row."""
        arrays = token_arrays(config.data.sequence_length)
        if config.model.architecture == "encoder_decoder":
            names = ("encoder_inputs", "encoder_positions", "encoder_segment_ids")
            arrays |= {name: (source_length(config), "int32") for name in names}
        return arrays

    def window_length(self, config: Config) -> int:
        """Returns how many tokens of text fill an example."""
        return config.data.sequence_length

    def num_extra_tokens(self, config: Config) -> int:
        """Returns how many tokens the objective adds: they have the numbers from the tokenizer's `vocab_size` on."""
        return 0


@dataclass(frozen=True)
class ExampleMaker:
    """Makes the rows of one run's batches."""

    objective: Objective
    config: Config
    tokenizer: Tokenizer

    @property
    def arrays(self) -> dict[str, tuple[int, str]]:
        """Length and NumPy type of each array of a row."""
        return self.objective.arrays(self.config)

    def __call__(self, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of a window."""
        return self.objective.example(self.config, self.tokenizer, window, rng)


def with_examples(prepared: Prepared, objective: Objective, config: Config) -> Prepared:
    """Returns `prepared` with examples of an objective made from its windows."""
    return dataclasses.replace(prepared, maker=ExampleMaker(objective, config, prepared.tokenizer))

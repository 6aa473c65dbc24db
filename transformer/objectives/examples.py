"""The bridge from windows to rows: what the pipeline of batches is given of an objective."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from transformer.config import Config
from transformer.data.prepared import Prepared
from transformer.data.tokenizers import Tokenizer
from transformer.objectives.terms import Objective, Row


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

    def __call__(self, window: Row, rng: np.random.Generator) -> Row:
        """Returns the row of a window."""
        return self.objective.example(self.config, self.tokenizer, window, rng)


def with_examples(prepared: Prepared, objective: Objective, config: Config) -> Prepared:
    """Returns `prepared` with examples of an objective made from its windows."""
    return dataclasses.replace(prepared, maker=ExampleMaker(objective, config, prepared.tokenizer))

"""What a model learns: each objective turns text into examples and outputs into terms, in a file of its own."""

import importlib
from typing import Any, cast

from transformer.config import Config, replace
from transformer.objectives.examples import with_examples
from transformer.objectives.terms import Objective, Terms, normalize

OBJECTIVES: dict[str, str] = {
    "causal": "transformer.objectives.causal",
    "prefix_lm": "transformer.objectives.prefix_lm",
    "fill_in_the_middle": "transformer.objectives.fill_in_the_middle",
    "multi_token": "transformer.objectives.multi_token",
    "masked_lm": "transformer.objectives.masked_lm",
    "span_corruption": "transformer.objectives.span_corruption",
    "mixture_of_denoisers": "transformer.objectives.mixture_of_denoisers",
    "seq2seq": "transformer.objectives.seq2seq",
    "sequence_classification": "transformer.objectives.sequence_classification",
    "token_classification": "transformer.objectives.token_classification",
}
"""Modules by name, loaded when a run asks for them; `terms.Objective` says what each has."""

__all__ = ["OBJECTIVES", "Objective", "Terms", "normalize", "objective_of", "with_examples", "with_window"]


def objective_of(config: Config) -> Objective:
    """Returns the objective of a run."""
    return cast(Any, importlib.import_module(OBJECTIVES[config.objective.name]))


def with_window(config: Config) -> Config:
    """Returns `config` with the length of the windows of text that its objective makes examples from."""
    length = config.data.window_length or objective_of(config).window_length(config)
    return replace(config, data={"window_length": length})

"""What a model learns: each objective turns text into examples and outputs into terms, in a file of its own."""

import importlib

from transformer.config import Config, ConfigError, replace
from transformer.objectives.objective import Objective, with_examples
from transformer.objectives.terms import Terms, normalize

OBJECTIVES: dict[str, tuple[str, str]] = {
    "causal": ("transformer.objectives.causal", "Causal"),
    "prefix_lm": ("transformer.objectives.prefix_lm", "PrefixLM"),
    "fill_in_the_middle": ("transformer.objectives.fill_in_the_middle", "FillInTheMiddle"),
    "multi_token": ("transformer.objectives.multi_token", "MultiToken"),
    "masked_lm": ("transformer.objectives.masked_lm", "MaskedLM"),
    "span_corruption": ("transformer.objectives.span_corruption", "SpanCorruption"),
    "mixture_of_denoisers": ("transformer.objectives.mixture_of_denoisers", "MixtureOfDenoisers"),
    "seq2seq": ("transformer.objectives.seq2seq", "Seq2Seq"),
    "sequence_classification": ("transformer.objectives.sequence_classification", "SequenceClassification"),
    "token_classification": ("transformer.objectives.token_classification", "TokenClassification"),
    "regression": ("transformer.objectives.regression", "Regression"),
    "span_extraction": ("transformer.objectives.span_extraction", "SpanExtraction"),
    "text_to_text": ("transformer.objectives.text_to_text", "TextToText"),
    "associative_recall": ("transformer.objectives.associative_recall", "AssociativeRecall"),
    "chat": ("transformer.objectives.chat", "Chat"),
    "dpo": ("transformer.objectives.dpo", "Dpo"),
}
"""Module and class by name, loaded when a run asks for them."""

__all__ = ["OBJECTIVES", "Objective", "Terms", "normalize", "objective_of", "with_examples", "with_window"]


def objective_of(config: Config) -> Objective:
    """Returns the objective of a run."""
    module, name = OBJECTIVES[config.objective.name]
    return getattr(importlib.import_module(module), name)()


def with_window(config: Config) -> Config:
    """Returns `config` with the length of its objective's windows of text; ConfigError if a longer one is given."""
    longest, given = objective_of(config).window_length(config), config.data.window_length
    if given is not None and given > longest:
        raise ConfigError(f"data.window_length = {given}: an example holds {longest} tokens of text at most")
    return replace(config, data={"window_length": given or longest})

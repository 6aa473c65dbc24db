"""Causal language modelling: each token from those before it."""

from transformer.objectives.cross_entropy import TokenObjective


class Causal(TokenObjective):
    """Each token from those before it."""

    COUNTS_TEXT = True

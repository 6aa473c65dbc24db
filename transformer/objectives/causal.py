"""Causal language modelling: each token from those before it."""

from transformer.objectives.objective import Objective


class Causal(Objective):
    """Each token from those before it."""

    COUNTS_TEXT = True

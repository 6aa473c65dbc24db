"""What a model learns: each objective turns outputs into named terms, (sum, weight), in a file of its own."""

from transformer.objectives.causal import causal
from transformer.objectives.terms import Objective, Terms, normalize

OBJECTIVES: dict[str, Objective] = {
    "causal": causal,
}

__all__ = ["OBJECTIVES", "Objective", "Terms", "normalize"]

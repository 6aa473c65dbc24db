"""Optimizers and learning-rate schedules, built from optax and found by name in two tables."""

from transformer.optimizers.averaging import evaluated, is_averaged, replace_average
from transformer.optimizers.optimizers import OPTIMIZERS, gradient_norm, make_optimizer, put_back, trained_part
from transformer.optimizers.schedules import SCHEDULES, make_schedule

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "evaluated",
    "gradient_norm",
    "is_averaged",
    "make_optimizer",
    "make_schedule",
    "put_back",
    "replace_average",
    "trained_part",
]

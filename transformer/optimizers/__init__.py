"""Optimizers and learning-rate schedules, built from optax and found by name in two tables."""

from transformer.optimizers.optimizers import OPTIMIZERS, make_optimizer
from transformer.optimizers.schedules import SCHEDULES, make_schedule

__all__ = ["OPTIMIZERS", "SCHEDULES", "make_optimizer", "make_schedule"]

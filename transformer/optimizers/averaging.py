"""Averages of the weights: what a run evaluates, samples from and stores where it is not what it trains."""

import importlib
from typing import Any, NamedTuple

import jax
from optax.contrib import ScheduleFreeState

from transformer.models.parameters import Tree


class AverageState(NamedTuple):
    """An average of the parameters after each of `count` updates."""

    count: Any
    average: Any


def evaluated(params: Tree, opt_state: Any) -> Tree:
    """Returns the average that an optimizer's state holds, `params` if it holds none."""
    state = _averaging(opt_state)
    if isinstance(state, AverageState):
        return state.average
    if isinstance(state, ScheduleFreeState):
        return importlib.import_module("transformer.optimizers.schedule_free").average(params, state)
    return params


def is_averaged(opt_state: Any) -> bool:
    return _averaging(opt_state) is not None


def replace_average(opt_state: Any, average: Any) -> Any:
    """Returns the state with another moving average in the place of its own, if it holds one."""

    def replaced(state: Any) -> Any:
        return state._replace(average=average) if isinstance(state, AverageState) else state

    return jax.tree.map(replaced, opt_state, is_leaf=lambda state: isinstance(state, AverageState))


def _averaging(opt_state: Any) -> Any:
    kinds = (AverageState, ScheduleFreeState)
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda state: isinstance(state, kinds))
    return next((state for state in leaves if isinstance(state, kinds)), None)

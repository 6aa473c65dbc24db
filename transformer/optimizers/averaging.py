"""Averages of the weights: what a run evaluates, samples from and stores where it is not what it trains."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState

from transformer.models.parameters import Tree


class AverageState(NamedTuple):
    """An average of the parameters after each of `count` updates."""

    count: Any
    average: Any


def moving_average(decay: float) -> optax.GradientTransformationExtraArgs:
    """Passes updates on and averages the parameters to which they lead, those of s updates ago weighing `decay`^s.

    The weights are divided by their sum, as those of Adam's moments are (Kingma & Ba 2015, arXiv:1412.6980, section 3),
    so that the average does not remember initial values.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, AverageState]:
        count = state.count + 1
        newest = (1 - decay) / -jnp.expm1(count * math.log(decay))
        moved = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda old, new: old + newest * (new - old), state.average, moved)
        return updates, AverageState(count, average)

    return optax.GradientTransformationExtraArgs(init, update)


def evaluated(params: Tree, opt_state: Any) -> Tree:
    """Returns the average that an optimizer's state holds, `params` if it holds none."""
    state = _averaging(opt_state)
    if isinstance(state, AverageState):
        return state.average
    if isinstance(state, ScheduleFreeState):
        layout = jax.tree.map(lambda leaf: leaf.sharding, params)
        return jax.jit(_schedule_free, out_shardings=layout)(params, state.b1, state.z)
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


def _schedule_free(params: Tree, beta: Any, z: Tree) -> Tree:
    """Returns x, where params = (1 - beta) z + beta x (Defazio et al. 2024, arXiv:2405.15682, algorithm 1)."""

    def average(y: Any, z: Any) -> Any:
        return y if isinstance(z, optax.MaskedNode) else (y - (1 - beta) * z) / beta

    return jax.tree.map(average, params, z)

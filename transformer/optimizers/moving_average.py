"""The moving average of the weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from transformer.optimizers.averaging import AverageState


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

"""The training state: what a checkpoint holds, where each array of it lives, and how it begins."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from transformer.config import Config
from transformer.models.parameters import Tree, abstract_parameters, init_parameters, map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import replicated, sharding


@dataclass(frozen=True)
class TrainState:
    """A pytree of arrays; trees of the same form hold their shapes or layouts.

    Randomness is folded from the seed and `step`, so no generator state is kept.
    """

    step: Any
    """Finished steps, skipped ones included: an int32 scalar."""
    params: Tree
    opt_state: Any
    nonfinite_steps: Any
    """Steps skipped in a row up to now because their gradient was not finite: an int32 scalar."""


jax.tree_util.register_dataclass(TrainState, ["step", "params", "opt_state", "nonfinite_steps"], [])


def initial_state(model: Transformer, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """Returns the state before the first step: a pure function of the seed."""
    params = init_parameters(model, jax.random.key(seed))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32))


def state_shardings(
    model: Transformer, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh
) -> TrainState:
    """Returns the layout of every array: moments lie where their parameters do, scalars everywhere."""
    whole = replicated(mesh)
    params = map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape), parameter_specs(model))
    opt_state = jax.eval_shape(optimizer.init, abstract_parameters(model))
    moments = optax.tree_utils.tree_map_params(
        optimizer, lambda _, layout: layout, opt_state, params, transform_non_params=lambda _: whole
    )
    return TrainState(whole, params, moments, whole)


def abstract_state(model: Transformer, optimizer: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns shape, type and layout of every array, without values."""
    shapes = jax.eval_shape(lambda: initial_state(model, optimizer, 0))
    return jax.tree.map(lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), shapes, shardings)


def create_state(config: Config, model: Transformer, optimizer: Any, shardings: TrainState) -> TrainState:
    """Initialises the state where it will live: no array is ever whole on one device."""
    return jax.jit(lambda: initial_state(model, optimizer, config.seed), out_shardings=shardings)()

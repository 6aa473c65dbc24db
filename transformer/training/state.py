"""The training state: what a checkpoint holds, where each array of it lives, and how it begins."""

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.tree_util import DictKey, GetAttrKey

from transformer.config import Config, ParallelConfig
from transformer.models.parameters import (
    ParameterSpec,
    Tree,
    abstract_parameters,
    divide,
    init_parameters,
    is_spec,
    map_specs,
    parameter_specs,
)
from transformer.models.transformer import Transformer
from transformer.optimizers import evaluated
from transformer.parallel.sharding import replicated, sharding


@dataclass(frozen=True)
class TrainState:
    """A pytree of arrays; trees of the same form hold their shapes or layouts.

    Randomness is folded from the seed and `step`, so no generator state is kept.
    """

    step: Any
    """Finished steps, skipped ones included: an int32 scalar."""
    params: Tree
    """Where gradients are taken."""
    opt_state: Any
    nonfinite_steps: Any
    """Steps skipped in a row up to now because their gradient was not finite: an int32 scalar."""
    frozen: Tree = field(default_factory=dict)
    """Parameters that are not trained, which checkpoints leave out: they are loaded from where they came from."""

    def evaluated(self) -> Tree:
        """Returns the parameters that are validated, sampled from and stored for every use but resuming: the average
        that the optimizer keeps, `params` if it keeps none."""
        return evaluated(self.params, self.opt_state)


jax.tree_util.register_dataclass(TrainState, ["step", "params", "opt_state", "nonfinite_steps", "frozen"], [])


def initial_state(model: Transformer, optimizer: optax.GradientTransformationExtraArgs, seed: int) -> TrainState:
    """Returns the state before the first step: a pure function of the seed."""
    params, frozen = divide(init_parameters(model, jax.random.key(seed)), parameter_specs(model))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32), frozen)


def state_shardings(
    model: Transformer,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: Mesh | AbstractMesh,
    parallel: ParallelConfig | None = None,
) -> TrainState:
    """Returns the layout of every array: moments lie where their parameters do, split over
    replicas or on the host if `parallel` says so; scalars everywhere."""
    whole, specs = replicated(mesh), parameter_specs(model)
    named = {_names(path): spec for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)}

    def layout(path: Any, leaf: Any) -> NamedSharding:
        spec = named.get(_names(path))
        axes = None if spec is None else _axes_left(spec, leaf.shape, path)
        found = whole if axes is None else sharding(mesh, axes, leaf.shape)
        if parallel is None or not (parallel.shard_optimizer or parallel.offload_optimizer):
            return found
        return importlib.import_module("transformer.parallel.moments").place(parallel, found, leaf.shape)

    opt_state = jax.eval_shape(optimizer.init, divide(abstract_parameters(model), specs)[0])
    params, frozen = divide(map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape), specs), specs)
    return TrainState(whole, params, jax.tree_util.tree_map_with_path(layout, opt_state), whole, frozen)


def _names(path: Any) -> tuple[Any, ...]:
    """Returns the keys of dictionaries at the end of a path: where a leaf of an optimizer's state belongs."""
    last = next((place for place, key in enumerate(reversed(path)) if not isinstance(key, DictKey)), len(path))
    return tuple(key.key for key in path[len(path) - last :])


def _axes_left(spec: ParameterSpec, shape: tuple[int, ...], path: Any) -> tuple[str, ...] | None:
    """Returns the logical axes of a parameter's moment, of which Adafactor averages one dimension away, None if it is
    something else."""
    if shape == spec.shape:
        return spec.axes
    dims = [dim for dim in range(len(spec.shape)) if spec.shape[:dim] + spec.shape[dim + 1 :] == shape]
    if not dims:
        return None
    # Of two equal dimensions optax averages over the later for the rows.
    gone = dims[-1] if GetAttrKey("v_row") in path else dims[0]
    return spec.axes[:gone] + spec.axes[gone + 1 :]


def abstract_state(
    model: Transformer, optimizer: optax.GradientTransformationExtraArgs, shardings: TrainState
) -> TrainState:
    """Returns shape, type and layout of every array, without values."""
    shapes = jax.eval_shape(lambda: initial_state(model, optimizer, 0))
    return jax.tree.map(lambda s, layout: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=layout), shapes, shardings)


def create_state(config: Config, model: Transformer, optimizer: Any, shardings: TrainState) -> TrainState:
    """Initialises the state where it will live: no array is ever whole on one device. What is frozen is left out."""
    made = jax.jit(
        lambda: replace(initial_state(model, optimizer, config.seed), frozen={}),
        out_shardings=replace(shardings, frozen={}),
    )
    return made()

"""Parameters: each states shape, initialiser, logical axes and role once; everything else derives from that.

A module holds `ParameterSpec`s and no arrays. `parameter_specs` lists them as a plain nested dictionary;
initial values, abstract shapes, shardings, decay masks and counts are maps over it, and `bind` puts a
dictionary of arrays back into the module for one forward pass.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Tree = dict[str, Any]
"""A nested dictionary with string keys."""

Role = Literal["matrix", "embedding", "head", "norm", "bias", "vector", "balance"]
Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)


def zeros(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


def normal(scale: float) -> Initializer:
    """Returns an initialiser that draws from N(0, scale^2)."""
    return lambda key, shape: scale * jax.random.normal(key, shape, jnp.float32)


@dataclass(frozen=True)
class ParameterSpec:
    """One array of parameters."""

    shape: tuple[int, ...]
    """Shape in memory."""
    axes: tuple[str, ...]
    """Logical name of each dimension, which `parallel.sharding` maps to mesh axes."""
    init: Initializer
    role: Role
    """What it is to an optimizer: only matrices, embeddings and the head are decayed; `balance` follows a sign."""
    padding_rows: int = 0
    """Rows at the end of the first dimension that exist only so that it splits: zero, never counted."""
    num_layers: int | None = None
    """Length of the leading dimension if the parameters of several equal layers are stacked."""
    dtype: str = "float32"
    is_frozen: bool = False
    """Whether it keeps the value that it was loaded with: no gradient, no moments."""

    def stacked(self, num_layers: int) -> "ParameterSpec":
        shape, axes = (num_layers, *self.shape), ("layers", *self.axes)
        return dataclasses.replace(self, shape=shape, axes=axes, num_layers=num_layers)

    def initialize(self, key: jax.Array) -> jax.Array:
        if self.num_layers is not None:
            single = dataclasses.replace(self, shape=self.shape[1:], num_layers=None)
            return jax.vmap(single.initialize)(jax.random.split(key, self.num_layers))
        values = self.init(key, (self.shape[0] - self.padding_rows, *self.shape[1:]))
        return jnp.pad(values, [(0, self.padding_rows)] + [(0, 0)] * (len(self.shape) - 1))

    @property
    def count(self) -> int:
        """Number of parameters, padding left out."""
        padding = self.padding_rows * math.prod(self.shape[1:]) if self.num_layers is None else 0
        return math.prod(self.shape) - padding


def parameter(
    shape: tuple[int, ...], axes: tuple[str, ...], init: Initializer, role: Role, padding_rows: int = 0
) -> nnx.Param:
    """Declares a parameter of a module."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(ParameterSpec(shape, axes, init, role, padding_rows))


def is_spec(value: Any) -> bool:
    return isinstance(value, ParameterSpec)


def map_specs(function: Callable[[ParameterSpec], Any], tree: Any) -> Any:
    """Returns the tree of `function(spec)`."""
    return jax.tree.map(function, tree, is_leaf=is_spec)


def parameter_specs(module: nnx.Module) -> Tree:
    """Returns the module's parameter declarations as a nested dictionary."""
    return nnx.to_pure_dict(nnx.split(module)[1])


def bind(module: ModuleT, tree: Tree) -> ModuleT:
    """Returns a copy of `module` whose parameters are the leaves of `tree` (arrays, tracers or specs)."""
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, tree)
    return nnx.merge(graph, state)


def stack(module: ModuleT, num_layers: int) -> ModuleT:
    """Returns `module` standing for `num_layers` equal layers: every parameter gets a leading dimension L."""
    return bind(module, map_specs(lambda spec: spec.stacked(num_layers), parameter_specs(module)))


def init_parameters(module: nnx.Module, key: jax.Array) -> Tree:
    """Returns initial values.

    The key of each array is derived from its path alone, so that adding or removing one parameter
    leaves the values of the others as they were.
    """

    def initialize(path: Any, spec: ParameterSpec) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return spec.initialize(jax.random.fold_in(key, zlib.crc32(name.encode())))

    return jax.tree_util.tree_map_with_path(initialize, parameter_specs(module), is_leaf=is_spec)


def abstract_parameters(module: nnx.Module) -> Tree:
    """Returns shapes and types, without values."""
    return map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), parameter_specs(module))


def divide(tree: dict[Any, Any], specs: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Returns what of a tree is trained, and what is frozen; `join` makes them one again."""
    trained: dict[Any, Any] = {}
    frozen: dict[Any, Any] = {}
    for name, spec in specs.items():
        if not isinstance(spec, dict):  # a declaration, or what stands for one that is left out
            (frozen if is_spec(spec) and spec.is_frozen else trained)[name] = tree[name]
            continue
        for part, half in zip((trained, frozen), divide(tree[name], spec), strict=True):
            part |= {name: half} if half else {}
    return trained, frozen


def join(trained: dict[Any, Any], frozen: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the one tree that `divide` has made two of."""
    both = {name: join(trained[name], frozen[name]) for name in trained.keys() & frozen.keys()}
    return trained | frozen | both


def num_parameters(module: nnx.Module) -> int:
    """Returns the number of parameters, padding rows left out."""
    return sum(spec.count for spec in jax.tree.leaves(parameter_specs(module), is_leaf=is_spec))

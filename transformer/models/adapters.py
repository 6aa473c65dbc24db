"""Low-rank adapters of linear maps: y = x W + s (x A) B, where W stays as it is (Hu et al. 2021, arXiv:2106.09685).

A model with adapters is the model itself, its linear maps replaced by `AdaptedLinear`: the parameters of the base keep their names,
and beside each `kernel` stand `lora_a` and `lora_b`. The sum W + s A B is never made but to be merged.
"""

import dataclasses
import fnmatch
import importlib
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from transformer.config import AdapterConfig, ConfigError, nearest
from transformer.models import flops
from transformer.models.blocks import Stack, fold_in
from transformer.models.latent_attention import LatentAttention
from transformer.models.layers import Linear, dropout
from transformer.models.parameters import (
    ParameterSpec,
    Tree,
    bind,
    is_spec,
    num_parameters,
    parameter_specs,
    zeros,
)
from transformer.models.transformer import Transformer

Path = tuple[str | int, ...]
ModuleT = TypeVar("ModuleT", bound=nnx.Module)

ADDED = ("lora_a", "lora_b", "magnitude", "norm_squared")
"""What an adapter adds to the parameters of a linear map. The last is the base's own, and no part of the adapter."""


class AdaptedLinear(Linear):
    """A linear map of the base with an adapter, or with its matrix in few bits, or both."""

    def __init__(self, base: Linear, path: Path, adapter: AdapterConfig, is_target: bool):
        self.path, self.adapter, self.product, self.bias = path, adapter, base.product, base.bias
        self.key: PRNGKeyArray | None = None
        kernel = parameter_specs(base)["kernel"]
        self.kernel = base.kernel if adapter.base == "none" else None
        stored = None if self.kernel is not None else few_bits().specs(kernel, adapter.base, adapter.base_block)
        self.codes, self.scales = (None, None) if stored is None else map(nnx.Param, stored)
        (inputs, outputs), (axis_in, axis_out) = kernel.shape[-2:], kernel.axes[-2:]
        # An output that is the residual stream is split nowhere in a vector, as biases are not.
        vector = "norm" if axis_out == "embed" else axis_out

        def added(exists: bool, shape: tuple[int, ...], axes: tuple[str, ...], *rest: Any) -> nnx.Param | None:
            spec = ParameterSpec(shape, axes, *rest)
            spec = spec if kernel.num_layers is None else spec.stacked(kernel.num_layers)
            return nnx.Param(spec) if exists else None

        has_norms = is_target and adapter.kind == "dora"
        self.lora_a = added(is_target, (inputs, adapter.rank), (axis_in, "rank"), uniform, "matrix")
        self.lora_b = added(is_target, (adapter.rank, outputs), ("rank", axis_out), zeros, "matrix")
        self.magnitude = added(has_norms, (outputs,), (vector,), zeros, "vector")
        self.norm_squared = added(has_norms, (outputs,), (vector,), zeros, "vector", 0, None, "float32", True)

    def map(self, rows: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = self.of_base(rows)
        if self.lora_a is None or self.lora_b is None:
            return y
        a, b = (matrix[...].astype(rows.dtype) for matrix in (self.lora_a, self.lora_b))
        y = y + ((dropout(rows, self.adapter.dropout, self.key) @ a) @ b) * self.adapter.scale
        return y if self.magnitude is None else y * (self.magnitude[...] / self.column_norms()).astype(y.dtype)

    def of_base(self, rows: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Returns the product with the matrix of the base."""
        if self.codes is None or self.scales is None:
            return super().map(rows)
        return few_bits().product(rows, self.codes[...], self.scales[...], self.adapter.base)

    def column_norms(self) -> Float[Array, "O"]:
        """Returns the norms of the columns of W + s A B, without that sum: |w|^2 + 2 s (A^T W) b + s^2 (A^T A) b b.

        DoRA takes them for constants in the gradient (Liu et al. 2024, arXiv:2402.09353, section 4.3).
        """
        assert self.lora_a is not None and self.lora_b is not None and self.norm_squared is not None
        a, b = (jax.lax.stop_gradient(matrix[...]) for matrix in (self.lora_a, self.lora_b))
        scale = self.adapter.scale
        mixed = jnp.sum(self.of_base(a.T) * b, axis=0)
        added = jnp.sum((a.T @ a @ b) * b, axis=0)
        norms = jnp.sqrt(jnp.maximum(self.norm_squared[...] + 2 * scale * mixed + scale**2 * added, 1e-30))
        # A product with the inverse root, which the compiler would make of a division by a root, is not 1 for B = 0.
        return jax.lax.optimization_barrier(norms)


def few_bits() -> Any:
    """Loaded by name, for it is an extra's."""
    return importlib.import_module("transformer.models.few_bits")


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws A within 1 / sqrt(I), as LoRA's authors and PEFT do."""
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def linear_maps(module: nnx.Module, kind: type[ModuleT] = Linear) -> dict[Path, ModuleT]:
    """Returns the linear maps of the layers by their paths among the parameters: all whose matrix is one to an optimizer."""
    found: dict[Any, Any] = {path: part for path, part in nnx.iter_graph(module) if isinstance(part, kind)}
    others = [path for path, part in found.items() if not isinstance(part, AdaptedLinear) and not _is_matrix(part)]
    for path in others:
        del found[path]
    return found


def _is_matrix(linear: Linear) -> bool:
    return parameter_specs(linear)["kernel"].role == "matrix"


def adapted(model: Transformer, adapter: AdapterConfig) -> Transformer:
    """Returns `model` with adapters, all of the base frozen but what `also_trained` says.

    Raises ConfigError for targets that no linear map has, and for those that cannot have an adapter.
    """
    absorbed = _absorbed(model)
    maps = {path: linear for path, linear in linear_maps(model).items() if path not in absorbed}
    chosen = _targets(model, adapter, maps, absorbed)

    def frozen(path: Any, spec: ParameterSpec) -> ParameterSpec:
        names = tuple(str(key.key) for key in path)
        whole = any(_matches(names[:end], adapter.also_trained) for end in range(1, len(names) + 1))
        return dataclasses.replace(spec, is_frozen=not whole)

    specs = jax.tree_util.tree_map_with_path(frozen, parameter_specs(model), is_leaf=is_spec)
    model = bind(model, specs)
    for path, linear in linear_maps(model).items():
        if path in chosen or (adapter.base != "none" and path in maps):
            _replace(model, path, AdaptedLinear(linear, path, adapter, path in chosen))
    for stack in [part for _, part in nnx.iter_graph(model) if isinstance(part, Stack)]:
        stack.with_key = with_key
    return model


def with_key(layer: ModuleT, key: PRNGKeyArray | None) -> ModuleT:
    """Gives each adapter of a layer a key of its own."""
    for path, linear in linear_maps(layer, AdaptedLinear).items() if key is not None else ():
        linear.key = nnx.data(fold_in(key, zlib.crc32("/".join(map(str, path)).encode())))
    return layer


def _replace(module: Any, path: Path, linear: Linear) -> None:
    *parents, last = path
    for name in parents:
        module = module[name] if isinstance(name, int) else getattr(module, name)
    setattr(module, str(last), linear)


def _matches(path: Sequence[str | int], patterns: Sequence[str]) -> bool:
    """Returns whether one of the patterns is the last name of a path, or the path, with * for any part."""
    whole = "/".join(map(str, path))
    return any(fnmatch.fnmatchcase(name, pattern) for name in (whole, str(path[-1])) for pattern in patterns)


def _absorbed(model: Transformer) -> set[Path]:
    """Returns the maps whose matrices decoding multiplies with others, so that they have to be matrices."""
    layers: list[Any] = [path for path, part in nnx.iter_graph(model) if isinstance(part, LatentAttention)]
    return {(*path, name) for path in layers for name in ("key", "value")}


def _targets(model: Transformer, adapter: AdapterConfig, maps: dict[Path, Linear], absorbed: set[Path]) -> set[Path]:
    """Returns the paths of the linear maps that the patterns name; each has to name one, and only such."""
    leaves = jax.tree_util.tree_leaves_with_path(parameter_specs(model), is_leaf=is_spec)
    expert = {tuple(key.key for key in path) for path, spec in leaves if "experts" in spec.axes}
    chosen: set[Path] = set()
    problems = []
    for pattern in adapter.targets:
        found = {path for path in maps if _matches(path, [pattern])}
        label = f"adapter.targets: {pattern!r}"
        others = {
            "experts, which have no adapters": [path for path in expert if _matches(path, [pattern])],
            "latent attention's map, which decoding multiplies with others": [
                path for path in absorbed if _matches(path, [pattern])
            ],
        }
        for what, paths in others.items() if pattern != "*" else ():
            problems += [f"{label} names {'/'.join(map(str, path))}: {what}" for path in sorted(paths)[:1]]
        if not found and not any(others.values()):
            names = sorted({str(path[-1]) for path in maps})
            problems.append(
                f"{label} is no linear map of this model: there are {', '.join(names)}{nearest(pattern, names)}"
            )
        chosen |= found
    if problems:
        raise ConfigError(problems)
    return chosen


def adapters(model: Transformer) -> dict[Path, AdaptedLinear]:
    """Returns the linear maps that have an adapter."""
    return {path: part for path, part in linear_maps(model, AdaptedLinear).items() if part.lora_a is not None}


def at(tree: Any, path: Path) -> Tree:
    """Returns the part of a tree at a path."""
    for name in path:
        tree = tree[name]
    return tree


def counts(model: Transformer, specs: Tree) -> tuple[int, int]:
    """Returns how many parameters are trained, of those in `specs`, and how many the model has; weights in few bits count one by one."""
    trained = sum(spec.count for spec in jax.tree.leaves(specs, is_leaf=is_spec) if not spec.is_frozen)
    added = sum(
        spec.count
        for linear in adapters(model).values()
        for name, spec in parameter_specs(linear).items()
        if name in ADDED[:3]
    )
    return trained, num_parameters(Transformer(model.config)) + added


def share(model: Transformer, specs: Tree) -> str:
    """Returns how many parameters are trained, of those in `specs`, in words."""
    trained, total = counts(model, specs)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"


def flops_per_token(model: Transformer, length: int, source_length: int = 0) -> float:
    """Returns what adapters add to `flops.training_flops_per_token`, which may be below zero: their own products, less the
    gradients of the matrices that are frozen. DoRA's norms, once a step and not once a token, are left out."""
    parts = flops.forward_flops(model.config, length, source_length)
    maps = sum(cost for name, cost in parts.items() if "_scores" not in name and name != "recurrence")
    reads = model.config.architecture == "encoder_decoder"
    added = 0
    for path, linear in adapters(model).items():
        of_source = reads and (path[0] == "encoder" or path[-2:] in (("cross", "key"), ("cross", "value")))
        pair = [spec.count for name, spec in parameter_specs(linear).items() if name in ("lora_a", "lora_b")]
        added += 6 * sum(pair) * (source_length if of_source else length)
    return (added - maps) / length


def merged(model: Transformer, params: Tree) -> Tree:
    """Returns the parameters of the model without adapters that computes the same: W + s A B, under DoRA with columns of the
    learnt norms."""
    return _plain(model, params, _merge)


def unmerged(model: Transformer, params: Tree, adapter: Tree) -> Tree:
    """Returns merged parameters without the adapter whose arrays are `adapter`: W - s A B, to rounding.

    Raises ConfigError under DoRA: the norms of the base's columns are not in what is merged.
    """
    if any(linear.magnitude is not None for linear in adapters(model).values()):
        reason = "merging replaced the norms of the base's columns, which are known to the base alone"
        raise ConfigError(f"adapter.kind = 'dora' cannot be taken out again: {reason}")
    result = jax.tree.map(lambda leaf: leaf, params)
    for path, linear in adapters(model).items():
        own, place = at(adapter, path), at(result, path)
        place["kernel"] = _add_product(place["kernel"], own["lora_a"], own["lora_b"], -linear.adapter.scale)
    return result


def base_of(model: Transformer, params: Tree) -> Tree:
    """Returns the parameters of the base alone, as matrices of float32 whatever they are kept in."""
    return _plain(model, params, lambda linear, own: kernel_of(linear, own))


def _plain(model: Transformer, params: Tree, make: Callable[[AdaptedLinear, Tree], Array]) -> Tree:
    result = jax.tree.map(lambda leaf: leaf, params)
    for path, linear in linear_maps(model, AdaptedLinear).items():
        own, place = at(params, path), at(result, path)
        place["kernel"] = make(linear, own)
        for name in (*ADDED, "codes", "scales"):
            place.pop(name, None)
    return result


def kernel_of(linear: AdaptedLinear, own: Tree) -> Float[Array, "... I O"]:
    """Returns the matrices of the base."""
    if linear.adapter.base == "none":
        return own["kernel"]
    return few_bits().matrix(own["codes"], own["scales"], linear.adapter.base)


def in_few_bits(linear: AdaptedLinear, kernel: Array, layout: Callable[[ParameterSpec], Any]) -> Tree:
    """Returns what is kept in the place of a base's matrices, laid out as `layout` says."""
    adapter = linear.adapter
    specs = parameter_specs(linear)
    layouts = (layout(specs["codes"]), layout(specs["scales"]))
    made = jax.jit(few_bits().quantize, static_argnums=(1, 2), out_shardings=layouts)(
        kernel, adapter.base, adapter.base_block
    )
    return dict(zip(("codes", "scales"), made, strict=True))


def norm_squared(linear: AdaptedLinear, own: Tree) -> Float[Array, "... O"]:
    """Returns the squared norms of the columns of a base's matrices."""
    return jnp.sum(jnp.square(kernel_of(linear, own)), axis=-2)


def begun(trained: Tree, base: Tree) -> Tree:
    """Returns the trained arrays as they begin on a base: its own where they are the base's, and its columns' norms."""

    def value(path: Any, drawn: Array) -> Array:
        *parents, last = (key.key for key in path)
        place: Any = base
        for name in parents:
            place = place.get(name, {})
        if last == "magnitude":
            return jnp.sqrt(place["norm_squared"])
        return jnp.copy(place[last]) if last in place else drawn

    return jax.tree_util.tree_map_with_path(value, trained)


def _merge(linear: AdaptedLinear, own: Tree) -> Array:
    kernel = kernel_of(linear, own)
    if "lora_a" not in own:
        return kernel
    kernel = _add_product(kernel, own["lora_a"], own["lora_b"], linear.adapter.scale)
    return kernel if "magnitude" not in own else _with_norms(kernel, own["magnitude"])


@jax.jit
def _add_product(kernel: Array, a: Array, b: Array, scale: Any) -> Array:
    return kernel + scale * jnp.matmul(a, b, precision="highest")


@jax.jit
def _with_norms(kernel: Array, magnitude: Array) -> Array:
    return kernel * (magnitude / jnp.linalg.norm(kernel, axis=-2))[..., None, :]

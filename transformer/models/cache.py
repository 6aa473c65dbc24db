"""What a model remembers of the tokens before: arrays that are passed in, and returned with the new tokens in them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

Cache = dict[str, Any]
"""A nested dictionary of arrays. At the top: `positions` and `segment_ids` [B, S] of the columns, `index`, the number of
columns in use, and `layers`, what each layer keeps."""


@dataclass(frozen=True)
class CacheSpec:
    """One array of a cache: zero at first."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    """Logical name of each dimension, which `parallel.sharding` maps to mesh axes."""
    dtype: Any = jnp.float32

    def stacked(self, num_layers: int) -> "CacheSpec":
        return dataclasses.replace(self, shape=(num_layers, *self.shape), axes=("layers", *self.axes))


def map_cache(function: Callable[..., Any], specs: Any, *others: Any) -> Any:
    """Returns the tree of `function(spec, ...)`."""
    return jax.tree.map(function, specs, *others, is_leaf=lambda leaf: isinstance(leaf, CacheSpec))


def zeros(specs: Any) -> Cache:
    """Returns an empty cache."""
    return map_cache(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)


def read(array: jax.Array, layer: Any) -> jax.Array:
    """Returns what one layer has in an array [L, ...]."""
    return jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)


def write(array: jax.Array, layer: Any, value: jax.Array, column: Any = 0, axis: int = 1) -> jax.Array:
    """Returns an array [L, B, ...] with `value` [B, ...] in one layer, from a column on, which `value` has along `axis`."""
    starts = (layer, *(column if place == axis else 0 for place in range(value.ndim)))
    return jax.lax.dynamic_update_slice(array, value[None].astype(array.dtype), starts)


def keep_memory(
    cache: Cache | None, layer: Any, made: tuple[jax.Array, jax.Array] | None
) -> tuple[Cache | None, tuple[jax.Array, jax.Array]]:
    """Returns the keys and values of what a decoder reads: those just made, which go into a cache, or None and its own."""
    if made is None:
        assert cache is not None
        return cache, (read(cache["key"], layer), read(cache["value"], layer))
    if cache is not None:
        cache = cache | {name: write(cache[name], layer, x) for name, x in zip(("key", "value"), made, strict=True)}
    return cache, made

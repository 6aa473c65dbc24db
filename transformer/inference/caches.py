"""A cache as a whole: where it lies, and how its rows and columns are moved, whatever the layers keep in it."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, Int

from transformer.models.cache import Cache, CacheSpec, map_cache
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import constrain, replicated

Kind = Literal["columns", "state", "memory"]
"""`columns`: each token in a place of its own, for good; `state`: what is overwritten, such as a ring or the state of a
recurrence; `memory`: what was read from an encoder, which stays."""


@contextlib.contextmanager
def placing(params: Tree) -> Iterator[Callable[[Any], Any]]:
    """Gives a function that puts a tree on the devices of `params`, under their mesh if they have one."""
    layout = jax.tree.leaves(params)[0].sharding
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    assert not isinstance(mesh, AbstractMesh)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        yield lambda tree: jax.device_put(tree, layout if mesh is None else replicated(mesh))


def _sizes(cache: Cache) -> tuple[int, int, int]:
    """Returns the batch size, the number of columns, and that of the encoder's."""
    source_length = cache["memory"]["positions"].shape[1] if "memory" in cache else 0
    return *cache["positions"].shape, source_length


def _specs(model: Transformer, cache: Cache, length: int | None = None) -> Cache:
    """Returns the specification of every array of a cache, or of one with another `length`."""
    batch_size, own_length, source_length = _sizes(cache)
    specs = model.cache_specs(batch_size, own_length if length is None else length, source_length)
    prefix = dataclasses.replace(specs["positions"], dtype=bool)
    return specs | ({"prefix": prefix} if "prefix" in cache else {})


def constrained(model: Transformer, cache: Cache) -> Cache:
    """Fixes the layout of a cache under the current mesh."""
    return map_cache(lambda spec, array: constrain(array, *spec.axes), _specs(model, cache), cache)


def _kinds(model: Transformer, cache: Cache) -> Cache:
    """Returns the kind of every array that the layers keep: what grows with the text, with the source, or with neither."""
    batch_size, length, source_length = _sizes(cache)
    sizes = ((length, source_length), (length + 1, source_length), (length, source_length + 1))
    specs = [model.cache_specs(batch_size, *size)["layers"] for size in sizes]

    def kind(spec: CacheSpec, longer: CacheSpec, wider: CacheSpec) -> Kind:
        return "columns" if longer != spec else "memory" if wider != spec else "state"

    return map_cache(kind, *specs)


def can_rewind(model: Transformer, cache: Cache) -> bool:
    """Returns whether tokens can be taken back by leaving their columns unused."""
    return "state" not in jax.tree.leaves(_kinds(model, cache))


def rewound(cache: Cache, index: Int[Array, ""]) -> Cache:
    """Returns a cache whose columns from `index` on are unused."""
    is_used = jnp.arange(cache["positions"].shape[1]) < index
    return cache | {"index": index, "segment_ids": jnp.where(is_used, cache["segment_ids"], 0)}


def repeated(model: Transformer, cache: Cache, count: int) -> Cache:
    """Returns a cache with each row `count` times, side by side."""

    def repeat(spec: CacheSpec, array: Array) -> Array:
        return jnp.repeat(array, count, axis=spec.axes.index("batch")) if "batch" in spec.axes else array

    return map_cache(repeat, _specs(model, cache), cache)


def reordered(model: Transformer, cache: Cache, rows: Int[Array, "B"]) -> Cache:
    """Returns a cache whose row i is what `rows[i]` was, where both have the same places and the same source."""
    specs, kinds = _specs(model, cache)["layers"], _kinds(model, cache)

    def take(spec: CacheSpec, array: Array, kind: Kind) -> Array:
        if kind == "memory" or "batch" not in spec.axes:
            return array
        return jnp.take(array, rows, axis=spec.axes.index("batch"), mode="clip")

    return cache | {"layers": map_cache(take, specs, cache["layers"], kinds)}


def lengthened(model: Transformer, cache: Cache, length: int) -> Cache:
    """Returns a cache with room for `length` tokens; it must not have used more columns than it had room for."""

    def pad(spec: CacheSpec, array: Array) -> Array:
        # A ring that has not been full has its columns in order, like one that is longer.
        room = [(0, new - old) for new, old in zip(spec.shape, array.shape, strict=True)]
        return jnp.pad(array, room) if room else array

    return constrained(model, map_cache(pad, _specs(model, cache, length), cache))


def row_by_row(model: Transformer, cache: Cache) -> Cache:
    """Returns the caches of single rows, each with a batch of 1 and an index of its own, along a new first dimension."""
    batch_size = len(cache["positions"])

    def split(spec: CacheSpec, array: Array) -> Array:
        if "batch" not in spec.axes:
            return jnp.broadcast_to(array, (batch_size, *array.shape))
        place = spec.axes.index("batch")
        return jnp.expand_dims(jnp.moveaxis(array, place, 0), place + 1)

    return map_cache(split, _specs(model, cache), cache)

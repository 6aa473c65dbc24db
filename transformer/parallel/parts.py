"""Texts split over the devices of the mesh's `context` axis: what a device does with its own part, and what it hands on."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.parallel.sharding import RULES, partition_spec

(AXIS,) = RULES["length"]

Axes = tuple[str, ...]


def num_parts(*lengths: int) -> int:
    """Returns over how many devices of the current mesh texts of these lengths are split: 1 where one does not divide, and
    inside a `shard_map`, where a device sees to its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if AXIS in mesh.manual_axes else mesh.shape.get(AXIS, 1)
    return 1 if any(length % parts for length in lengths) else parts


@dataclass(frozen=True)
class Layout:
    """The mesh axes that split rows and heads of some activations; the lengths are split over `AXIS`."""

    batch: Axes
    heads: Axes

    @property
    def num_ways(self) -> int:
        """Parts that the heads are split into."""
        sizes = jax.sharding.get_abstract_mesh().shape
        return math.prod(sizes[axis] for axis in self.heads)

    @property
    def tokens(self) -> PartitionSpec:
        """The layout of [B, T, ...]."""
        return PartitionSpec(self.batch, AXIS)

    @property
    def activations(self) -> PartitionSpec:
        """The layout of [B, T, N, ...]."""
        return PartitionSpec(self.batch, AXIS, self.heads)

    def per_head(self, array: Array) -> PartitionSpec:
        """Returns the layout of an array of a bias, whose last dimension is that of the query heads."""
        return PartitionSpec(*[None] * (array.ndim - 1), self.heads)

    def repeated(self, x: Float[Array, "B S K H"]) -> Float[Array, "B S Q H"]:
        """Returns keys or values with each head so often that the heads divide by their axes: each device needs its own."""
        return jnp.repeat(x, math.lcm(x.shape[2], self.num_ways) // x.shape[2], axis=2)


def layout_of(x: Float[Array, "B T N ..."]) -> Layout:
    """Returns the layout of activations with heads; what does not divide is whole on each device."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return Layout(
        *(_axes(partition_spec((name,), (x.shape[dim],), sizes)[0]) for dim, name in ((0, "batch"), (2, "heads")))
    )


def _axes(entry: Any) -> Axes:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def on_parts(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `function` run by each device on its part, on all axes of the mesh that are not a `shard_map`'s already."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    # What loops make is not known to vary over the mesh before they have run.
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def shift(tree: Any, places: int) -> Any:
    """Returns what the device so many places before on the ring has."""
    count = jax.lax.axis_size(AXIS)
    if places % count == 0:
        return tree
    return jax.lax.ppermute(tree, AXIS, [(device, (device + places) % count) for device in range(count)])


def handed_on(tree: Any, places: int = 1, backwards: bool = False) -> Any:
    """Returns what the device so many places before has, zeros where there is none; or after, if `backwards`."""
    pairs = [(device, device + places) for device in range(jax.lax.axis_size(AXIS) - places)]
    return jax.lax.ppermute(tree, AXIS, [(to, source) for source, to in pairs] if backwards else pairs)


def before(summary: Any, compose: Callable[[Any, Any], Any], backwards: bool = False) -> Any:
    """Returns the summary of all parts before each device's own, zeros on the first; or of all after it, if `backwards`.

    `compose(later, earlier)` gives the summary of two neighbours; of a part and zeros, the part's own. It takes as many
    rounds as the number of devices has bits (Hillis & Steele 1986, "Data Parallel Algorithms").
    """
    places = 1
    while places < jax.lax.axis_size(AXIS) - 1:  # what the last device has is nobody's past
        summary = compose(summary, handed_on(summary, places, backwards))
        places *= 2
    return handed_on(summary, 1, backwards)

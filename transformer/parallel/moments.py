"""Where the optimizer's moments lie if not where their parameters do: on the host, or split over replicas too.

Split (ZeRO stage 1, Rajbhandari et al. 2020, arXiv:1910.02054), each replica keeps and updates a part of what it holds the
parameters of: gradients are summed into these parts, and the new parameters gathered from them. It costs no more
communication than a sum of whole gradients.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from transformer.config import ParallelConfig

AXIS = "replica"


def place(parallel: ParallelConfig, layout: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Returns where a part of the optimizer's state lies whose parameter has this layout."""
    if parallel.shard_optimizer:
        layout = split(layout, shape)
    return layout.with_memory_kind("pinned_host") if parallel.offload_optimizer and shape else layout


def split(layout: NamedSharding, shape: Sequence[int]) -> NamedSharding:
    """Returns `layout` with the largest piece of a dimension that divides split over replicas as well.

    The replicas come after what splits the dimension already, so that each takes a part of what it has. What does not
    divide stays whole.
    """
    sizes = layout.mesh.shape
    entries = [entry or () for entry in (*layout.spec, *[None] * (len(shape) - len(layout.spec)))]
    axes: list[tuple[str, ...]] = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in entries]
    pieces = [dim // math.prod(sizes[axis] for axis in held) for dim, held in zip(shape, axes, strict=True)]
    fitting = [dim for dim, piece in enumerate(pieces) if piece % sizes[AXIS] == 0]
    if sizes[AXIS] == 1 or not fitting or any(AXIS in held for held in axes):
        return layout
    chosen = max(fitting, key=lambda dim: pieces[dim])
    axes[chosen] = (*axes[chosen], AXIS)
    spec = PartitionSpec(*(held[0] if len(held) == 1 else held or None for held in axes))
    return NamedSharding(layout.mesh, spec, memory_kind=layout.memory_kind)


def split_all(layouts: Any, specs: Any) -> Any:
    """Returns the layouts of parameters' gradients: each split as its moments are."""
    return jax.tree.map(lambda layout, spec: split(layout, spec.shape), layouts, specs)

"""One mesh and one table of rules: logical names of dimensions to axes of the mesh.

The compiler (GSPMD, Xu et al. 2021, arXiv:2105.04663) inserts the collectives; what it is told is the
layout of every parameter and of a few activations.
"""

import contextlib
import importlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config import DATA_AXES, MESH_AXES, Config, mesh_axes, validate

RULES: Mapping[str, tuple[str, ...]] = {
    # Activations.
    "batch": DATA_AXES,
    "length": ("context",),
    "residual_length": ("context",),
    "hidden": (),
    "whole": (),
    # Places of experts are split as the batch is, or else by experts: tokens then travel between these devices.
    "groups": ("replica", "fsdp"),
    "places": (),
    # Parameters: `fsdp` splits what `tensor` leaves whole, so that every large array is split by both.
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "state": (),
    "positions": (),
    "layers": ("stage",),
    "norm": (),
    # Both: split inside a layer (Shoeybi et al. 2019, arXiv:1909.08053).
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "head_width": (),
    "latent": (),
    "rank": (),
    "experts": ("expert",),
    "router": (),
    "taps": (),
    "joined": (),
    "buckets": (),
    "labels": (),
}


rules_in_use = jax.make_user_context(tuple(RULES.items()))
"""The table in use, which JAX makes part of the key of what it has traced."""


def use_rules(config: Config) -> contextlib.AbstractContextManager[Any]:
    """Within it, layouts follow the table of this configuration; raises ConfigError for rules that cannot be."""
    if not config.parallel.rules and not config.parallel.sequence_sharding:
        return contextlib.nullcontext()
    return rules_in_use(importlib.import_module("transformer.parallel.rules").make_table(config, RULES))


def make_mesh(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over all devices; raises ConfigError if axes or batch do not divide, or attention runs on others."""
    devices = jax.devices() if devices is None else devices
    validate(config, len(devices), devices[0].platform)
    shape = tuple(mesh_axes(config, len(devices)).values())
    if math.prod(shape) == 1 or devices[0].platform == "cpu":
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = importlib.import_module("transformer.parallel.torus").arranged(shape, devices)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def partition_spec(
    axes: Sequence[str],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] | None = None,
) -> PartitionSpec:
    """Returns the layout of an array whose dimensions have the logical names `axes`.

    A mesh axis that does not divide its dimension (`sizes` are those of the mesh) leaves it whole. Raises
    ValueError for a name without a rule, and for two names of one array that land on one mesh axis. Without `rules`,
    those of `use_rules` hold.
    """
    rules = dict(rules_in_use.value) if rules is None else rules
    entries: list[tuple[str, ...] | str | None] = []
    owner: dict[str, str] = {}
    for name, dim in zip(axes, shape, strict=True):
        if name not in rules:
            raise ValueError(f"no sharding rule for the logical axis {name!r}; there are {', '.join(rules)}")
        for axis in rules[name]:
            if axis in owner:
                raise ValueError(
                    f"logical axes {owner[axis]!r} and {name!r} of one array both map to mesh axis {axis!r}"
                )
            owner[axis] = name
        chosen = tuple(axis for axis in rules[name] if sizes.get(axis, 1) > 1)
        while chosen and dim % math.prod(sizes[axis] for axis in chosen):
            chosen = chosen[:-1]
        entries.append(chosen[0] if len(chosen) == 1 else chosen or None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh | AbstractMesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Returns the layout of one array over `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh.shape))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch's arrays, [B, T]: rows over the data-parallel axes, their length over `context`."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["length"]))


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Fixes the layout of an activation under the current mesh (`jax.set_mesh`); without one does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the rows of a global batch that this process's devices hold, in order."""
    rows: set[int] = set()
    for index in batch_sharding(mesh).addressable_devices_indices_map((batch_size, mesh.shape["context"])).values():
        assert index is not None
        rows.update(range(*index[0].indices(batch_size)))
    return sorted(rows)


def global_array(mesh: Mesh, rows: Sequence[int], batch_size: int, local: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a global batch whose rows `rows`, held by this process, are `local`; starts the transfers."""
    layout = batch_sharding(mesh)
    first = {row: number for number, row in enumerate(rows)}

    def place(values: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            return values[first[start] : first[stop - 1] + 1, *index[1:]]

        return jax.make_array_from_callback((batch_size, *values.shape[1:]), layout, piece)

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a training step needs
        return {name: place(values) for name, values in local.items()}

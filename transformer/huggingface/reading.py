"""Parameters from a folder, straight into sharded arrays: each process reads what its devices hold, and nothing else."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import family_of
from transformer.huggingface.folder import Folder, read_slice
from transformer.huggingface.header import Stored, shown
from transformer.huggingface.table import Family, Piece, Tensor, flat_specs, tensors_of
from transformer.huggingface.translation import read_config
from transformer.models.parameters import ParameterSpec, Tree
from transformer.parallel.sharding import sharding

Held = dict[tuple[int, ...], tuple[Stored, Tensor, Piece]]
"""What one of our arrays is read from, by layer and expert."""


def read(path: Path, mesh: Mesh) -> tuple[ModelConfig, Tree]:
    """Returns the model in a folder, and its parameters in float32 laid out over `mesh`; the model is `canonical`.

    Raises ConfigError, before any parameter is read, with everything that is wrong with the folder.
    """
    folder = Folder(path)
    family, model = model_of(folder)
    return model, read_parameters(folder, family, model, mesh)


def model_of(folder: Folder) -> tuple[Family, ModelConfig]:
    """Returns the table and the model that config.json names."""
    family = family_of(folder.config.get("model_type"))
    return family, read_config(family, folder.config, str(folder.path / "config.json"))


def read_parameters(folder: Folder, family: Family, model: ModelConfig, mesh: Mesh) -> Tree:
    """Returns the parameters of a model of the family, in float32, laid out over `mesh`."""
    held = matched(folder, family, model)
    tree: Tree = {}
    for path, spec in flat_specs(model).items():
        layout = sharding(mesh, spec.axes, spec.shape)

        def shard(index: Any, spec: ParameterSpec = spec, held: Held = held[path]) -> np.ndarray:
            return _read_shard(spec, held, index)

        *parents, name = path.split("/")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = _make_array(spec.shape, layout, shard)
    return tree


def _make_array(shape: tuple[int, ...], layout: Any, shard: Any) -> jax.Array:
    """Returns an array made shard by shard, of which devices that hold the same one read it once."""
    indices = layout.addressable_devices_indices_map(shape)
    made: dict[Any, list[Any]] = {}
    for device, index in indices.items():
        made.setdefault(tuple((part.start, part.stop) for part in index), []).append((device, index))
    arrays = []
    for devices in made.values():
        values = shard(devices[0][1])
        arrays += [jax.device_put(values, device) for device, _ in devices]
        jax.block_until_ready(arrays[-len(devices) :])
    return jax.make_array_from_single_device_arrays(shape, layout, arrays)


def matched(folder: Folder, family: Family, model: ModelConfig) -> dict[str, Held]:
    """Returns where each of our arrays is; raises ConfigError with every tensor that lacks, is too many or has another shape."""
    stored = folder.tensors
    # A number of config.json that the files do not bear out would make an endless table.
    for name, count in (("layers", max(model.num_layers, model.encoder_depth)), ("experts", model.num_experts)):
        if count > max(len(stored), 8):
            raise ConfigError(
                f"{folder.path}: config.json says {count:,} {name}, and there are {len(stored):,} tensors"
            )
    tensors = tensors_of(family, model)
    prefix = family.prefix
    if prefix and not any(name.startswith(prefix) for name in stored):
        prefix = ""
    names = {tensor.name: tensor.name.removeprefix(family.prefix) if not prefix else tensor.name for tensor in tensors}
    problems: list[str] = []
    found: dict[str, Held] = {}
    for tensor in tensors:
        have = stored.get(names[tensor.name])
        if have is None:
            problems.append(f"{names[tensor.name]} {tensor.shape} is missing")
            continue
        if have.shape != tensor.shape:
            problems.append(f"{have.name} has the shape {shown(have.shape)}, and config.json asks for {tensor.shape}")
            continue
        if have.dtype not in ("F32", "F16", "BF16"):
            problems.append(f"{have.name} is {have.dtype}; parameters are read from F32, F16 and BF16")
        for piece in tensor.pieces:
            found.setdefault(piece.path, {})[piece.at] = (have, tensor, piece)
    known = set(names.values())
    repeats = {name: first if prefix else first.removeprefix(family.prefix) for name, first in family.repeats.items()}
    without: dict[str, list[str]] = {}
    for name, have in stored.items():
        if name in known or any(re.fullmatch(pattern, name) for pattern in family.ignored):
            continue
        if reason := family.left_out(model, name):
            without.setdefault(reason, []).append(name)
            continue
        if name in repeats:
            if not _same(have, stored.get(repeats[name])):
                problems.append(
                    f"{name} {shown(have.shape)} differs from {repeats[name]}, which config.json says it is"
                )
            continue
        problems.append(f"{name} {shown(have.shape)} is no tensor of this {family.model_type}")
    if problems:
        raise ConfigError([f"{folder.path}: {problem}" for problem in problems])
    for reason, names_left in without.items():
        listed = f"{len(names_left):,} tensors, {names_left[0]} to {names_left[-1]}"
        logging.getLogger(__name__).warning(f"{folder.path}: {listed}, are left out: {reason}")
    return found


def _same(one: Stored, other: Stored | None) -> bool:
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    whole = tuple(slice(0, size) for size in one.shape)
    return all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(read_slice(one, whole), read_slice(other, whole), strict=True)
    )


def _read_shard(spec: ParameterSpec, held: Held, index: tuple[slice, ...]) -> np.ndarray:
    """Returns one shard of one of our arrays."""
    bounds = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
    # Made once and filled: rows of padding stay zero.
    values = np.zeros([len(bound) for bound in bounds], np.float32)
    leading = len(next(iter(held)))
    for at, (stored, tensor, piece) in held.items():
        if all(number in bound for number, bound in zip(at, bounds, strict=False)):
            place = tuple(number - bound.start for number, bound in zip(at, bounds, strict=False))
            _fill(values[place], stored, tensor, piece, bounds[leading:])
    return values


def _fill(target: np.ndarray, stored: Stored, tensor: Tensor, piece: Piece, bounds: list[range]) -> None:
    """Fills `target`, the part of ours within `bounds`, from a tensor of theirs."""
    line = tensor.line
    if line.transposed:
        target, bounds = target.T, bounds[::-1]
    bounds = [
        range(bound.start, min(bound.stop, size)) for bound, size in zip(bounds, _own_shape(tensor, piece), strict=True)
    ]
    if not all(bounds):
        return
    places = piece.places[bounds[line.axis].start : bounds[line.axis].stop]
    low, high = int(places.min()), int(places.max()) + 1
    cut = [slice(bound.start, bound.stop) for bound in bounds]
    cut[line.axis] = slice(low, high)
    plain = len(places) == high - low and bool(np.all(np.diff(places) == 1))
    within = np.full(high - low, -1)
    within[places - low] = np.arange(len(places))
    for rows, portion in read_slice(stored, tuple(cut)):
        own: Any = rows
        if not plain and line.axis == 0:
            own = within[rows]
            portion, own = portion[own >= 0], own[own >= 0]
        elif not plain:
            portion = np.take(portion, places - low, axis=line.axis)
        values = portion.astype(np.float32)
        part = target[tuple(slice(0, len(bound)) for bound in bounds)]
        part[own] = values + np.float32(line.offset) if line.offset else values


def _own_shape(tensor: Tensor, piece: Piece) -> tuple[int, ...]:
    shape = list(tensor.shape)
    shape[tensor.line.axis] = len(piece.places)
    return tuple(shape)


def names_of(model: ModelConfig, family: Family) -> Mapping[str, list[str]]:
    """Returns for each of our arrays, by path, the names of the tensors that it is made of."""
    found: dict[str, list[str]] = {}
    for tensor in tensors_of(family, model):
        for piece in tensor.pieces:
            found.setdefault(piece.path, []).append(tensor.name)
    return found

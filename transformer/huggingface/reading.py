"""Parameters from a folder, straight into sharded arrays: each process reads what its devices hold, and nothing else."""

import functools
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import family_of
from transformer.huggingface.folder import Folder, read_slice, same
from transformer.huggingface.header import Stored, shown
from transformer.huggingface.table import Family, Piece, Tensor, flat_specs, tensors_of
from transformer.huggingface.translation import read_config
from transformer.models.parameters import ParameterSpec, Tree
from transformer.parallel.sharding import sharding

Held = dict[tuple[int, ...], tuple[Stored, Tensor, Piece]]
"""What one of our arrays is read from, by layer and expert."""

Block = tuple[tuple[int, ...], np.ndarray]
"""A part of a shard: where it begins, and its values."""

LARGE = 2**25
"""Bytes of a shard from which on it is filled part by part where it lies."""


def read(path: Path, mesh: Mesh) -> tuple[ModelConfig, Tree]:
    """Returns the model in a folder, and its parameters in float32 laid out over `mesh`; the model is `canonical`.

    Raises ConfigError, before any parameter is read, with everything that is wrong with the folder.
    """
    folder = Folder(path)
    family, model = model_of(folder)
    return model, read_parameters(folder, family, model, mesh)


def model_of(folder: Folder) -> tuple[Family, ModelConfig]:
    """Returns the table and the model that config.json names."""
    theirs: Mapping[str, Any] = folder.config
    family = family_of(theirs.get("model_type"))
    if family.told_by_tensors is not None:
        theirs = family.told_by_tensors(theirs, folder.tensors)
    return family, read_config(family, theirs, str(folder.path / "config.json"))


def read_parameters(folder: Folder, family: Family, model: ModelConfig, mesh: Mesh) -> Tree:
    """Returns the parameters of a model of the family, in float32, laid out over `mesh`."""
    held = matched(folder, family, model)
    tree: Tree = {}
    for path, spec in flat_specs(model).items():
        layout = sharding(mesh, spec.axes, spec.shape)
        # Blocks of a period are counted, here as in parameters that were initialised.
        *parents, name = (int(part) if part.isdigit() else part for part in path.split("/"))
        inside: Any = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = _make_array(spec, layout, held[path])
    return tree


def _make_array(spec: ParameterSpec, layout: Any, held: Held) -> jax.Array:
    """Returns an array made shard by shard, of which devices that hold the same one read it once."""
    made: dict[Any, list[Any]] = {}
    for device, index in layout.addressable_devices_indices_map(spec.shape).items():
        bounds = [range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True)]
        made.setdefault(tuple(bounds), []).append(device)
    arrays = []
    for bounds, (first, *others) in made.items():
        shape = [len(bound) for bound in bounds]
        # A large one is filled where it lies: a copy on the host would be memory that no array is left of.
        make = _filled_in_place if 4 * math.prod(shape) > LARGE else _filled_on_host
        arrays.append(make(shape, _blocks(held, bounds), first))
        arrays += [jax.device_put(arrays[-1], device) for device in others]
    return jax.make_array_from_single_device_arrays(spec.shape, layout, arrays)


def _filled_on_host(shape: list[int], blocks: Iterator[Block], device: Any) -> jax.Array:
    values = np.zeros(shape, np.float32)
    for starts, block in blocks:
        values[tuple(slice(start, start + size) for start, size in zip(starts, block.shape, strict=True))] = block
    return jax.device_put(values, device)


def _filled_in_place(shape: list[int], blocks: Iterator[Block], device: Any) -> jax.Array:
    # A mesh that is in use would not have a device compute by itself.
    with jax.set_mesh(Mesh(np.array([device]), ("alone",))):
        values = jnp.zeros(shape, jnp.float32, device=device)
        for starts, block in blocks:
            # Waited for, so that no more than one block is under way.
            values = jax.block_until_ready(_put(values, np.ascontiguousarray(block), tuple(map(np.int32, starts))))
        return values


@functools.partial(jax.jit, donate_argnums=0)
def _put(values: jax.Array, block: Any, starts: tuple[Any, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(values, block, starts)


def _plain(name: str) -> str:
    """Returns a name from a file for a message: as it is, if it is one of a few printable characters."""
    return name if name.isprintable() and len(name) <= 100 else shown(name)


def matched(folder: Folder, family: Family, model: ModelConfig) -> dict[str, Held]:
    """Returns where each of our arrays is; raises ConfigError with every tensor that lacks, is too many or has another shape."""
    stored = {_renamed(family, name): tensor for name, tensor in folder.tensors.items()}
    # A number of config.json that the files do not bear out would make an endless table.
    for name, count in (("layers", max(model.num_layers, model.encoder_depth)), ("experts", model.num_experts)):
        if count > max(len(stored), 8):
            raise ConfigError(
                f"{folder.path}: config.json says {count:,} {name}, and there are {len(stored):,} tensors"
            )
    held = sum(math.prod(tensor.shape) for tensor in stored.values())
    for path, spec in flat_specs(model).items():
        if spec.count > held:
            problem = f"config.json asks for {path} of shape {shown(spec.shape)}, and the files hold {held:,} numbers"
            raise ConfigError(f"{folder.path}: {problem}")
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
            problems.append(
                f"{_plain(have.name)} has the shape {shown(have.shape)}, and config.json asks for {tensor.shape}"
            )
            continue
        if have.dtype not in ("F32", "F16", "BF16"):
            problems.append(f"{_plain(have.name)} is {have.dtype}; parameters are read from F32, F16 and BF16")
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
            if not same(have, stored.get(repeats[name])):
                problems.append(
                    f"{_plain(name)} {shown(have.shape)} differs from {repeats[name]}, which config.json says it is"
                )
            continue
        problems.append(f"{_plain(name)} {shown(have.shape)} is no tensor of this {family.model_type}")
    if problems:
        raise ConfigError([f"{folder.path}: {problem}" for problem in problems])
    for reason, names_left in without.items():
        listed = f"{len(names_left):,} tensors, {names_left[0]} to {names_left[-1]}"
        logging.getLogger(__name__).warning(f"{folder.path}: {listed}, are left out: {reason}")
    return found


def _renamed(family: Family, name: str) -> str:
    for pattern, now in family.renamed:
        name = re.sub(pattern, now, name)
    return name


def _blocks(held: Held, bounds: tuple[range, ...]) -> Iterator[Block]:
    """Yields what is within `bounds` of one of our arrays, part by part; rows of padding are in none."""
    for at, (stored, tensor, piece) in held.items():
        if all(number in bound for number, bound in zip(at, bounds, strict=False)):
            first = tuple(number - bound.start for number, bound in zip(at, bounds, strict=False))
            for starts, values in _parts(stored, tensor, piece, bounds[len(at) :]):
                yield (*first, *starts), values.reshape(*[1] * len(at), *values.shape)


def _parts(stored: Stored, tensor: Tensor, piece: Piece, bounds: tuple[range, ...]) -> Iterator[Block]:
    """Yields what is within `bounds` of one layer or expert of ours, from a tensor of theirs."""
    line = tensor.line
    shape = list(tensor.shape)
    shape[line.axis] = len(piece.places)
    turned = bounds[::-1] if line.transposed else bounds
    inside = [range(bound.start, min(bound.stop, size)) for bound, size in zip(turned, shape, strict=True)]
    if not all(inside):
        return
    places = piece.places[inside[line.axis].start : inside[line.axis].stop]
    low, high = int(places.min()), int(places.max()) + 1
    cut = [slice(bound.start, bound.stop) for bound in inside]
    cut[line.axis] = slice(low, high)

    def ours(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32) + np.float32(line.offset) if line.offset else values.astype(np.float32)
        return values.T if line.transposed else values

    if np.array_equal(places, np.arange(low, high)):
        for rows, portion in read_slice(stored, tuple(cut)):
            starts = (rows.start, *[0] * (portion.ndim - 1))
            yield starts[::-1] if line.transposed else starts, ours(portion)
    else:
        whole = np.concatenate([portion for _, portion in read_slice(stored, tuple(cut))])
        yield (0,) * whole.ndim, ours(np.take(whole, places - low, axis=line.axis))

"""Parameters into a folder: config.json and safetensors, tensor by tensor, in shards with an index where one would be too long."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import ml_dtypes
import numpy as np

from transformer.config import ModelConfig
from transformer.huggingface.folder import INDEX, WEIGHTS
from transformer.huggingface.table import Family, Tensor, tensors_of
from transformer.huggingface.translation import laid_out, write_config
from transformer.models.parameters import Tree

DType = Literal["float32", "bfloat16"]
TYPES: dict[str, tuple[str, Any]] = {"float32": ("F32", np.float32), "bfloat16": ("BF16", ml_dtypes.bfloat16)}

SHARD_SIZE = 5 * 10**9
"""Bytes of the longest file: what transformers writes too."""


def write(
    path: Path,
    family: Family,
    model: ModelConfig,
    params: Tree,
    dtype: DType = "float32",
    shard_size: int = SHARD_SIZE,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, with `more` keys, and the parameters to the directory `path`.

    Raises ConfigError if the family cannot say what the model is. In a file that is there already nothing is kept.
    """
    # Left out, they would be those of transformers' default, which may lie outside the vocabulary.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = write_config(family, model) | ids | {"dtype": dtype, "torch_dtype": dtype} | dict(more or {})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = laid_out(model)
    tensors = tensors_of(family, model)
    itemsize = np.dtype(TYPES[dtype][1]).itemsize
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = int(np.prod(tensor.shape, dtype=np.int64)) * itemsize
        if shards[-1] and filled + size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    leaves = {
        jax.tree_util.keystr(key, simple=True, separator="/"): leaf
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, members in zip([WEIGHTS] if len(shards) == 1 else names, shards, strict=True):
        arrays = ((tensor.name, gathered(tensor, leaves, model)) for tensor in members)
        write_tensors(path / name, [(tensor.name, tensor.shape) for tensor in members], arrays, dtype)
    if len(shards) > 1:
        total = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors) * itemsize
        places = {tensor.name: name for name, members in zip(names, shards, strict=True) for tensor in members}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (path / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    path: Path,
    shapes: Sequence[tuple[str, tuple[int, ...]]],
    arrays: Iterable[tuple[str, np.ndarray]],
    dtype: DType = "float32",
) -> None:
    """Writes a safetensors file with tensors of these names and shapes, which `arrays` gives one after another."""
    label, kind = TYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors then begin at a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, shape), (given, values) in zip(shapes, arrays, strict=True):
            assert given == name and values.shape == shape, (name, shape, given, values.shape)
            file.write(np.ascontiguousarray(values.astype(kind)).reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())


def gathered(tensor: Tensor, leaves: Mapping[str, Any], model: ModelConfig) -> np.ndarray:
    """Returns one of their tensors, in float32, made of ours."""
    line = tensor.line
    whole = np.empty(tensor.shape, np.float32)
    for piece in tensor.pieces:
        values = _on_host(leaves[piece.path], piece.at)
        values = values.T if line.transposed else values
        values = values.take(range(len(piece.places)), axis=line.axis) if _is_padded(values, tensor, piece) else values
        if line.offset:
            values = values - np.float32(line.offset)
        whole[(slice(None),) * line.axis + (piece.places,)] = values
    return whole


def _is_padded(values: np.ndarray, tensor: Tensor, piece: Any) -> bool:
    return values.ndim > 0 and values.shape[tensor.line.axis] != len(piece.places)


def _on_host(leaf: Any, at: tuple[int, ...]) -> np.ndarray:
    """Returns an array, or the layer or expert `at` of it, from the shards that hold it: no more than that is copied."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf[at])
    values = np.empty(leaf.shape[len(at) :], np.float32)
    for shard in leaf.addressable_shards:
        bounds = [range(*part.indices(size)) for part, size in zip(shard.index, leaf.shape, strict=True)]
        if shard.replica_id == 0 and all(number in bound for number, bound in zip(at, bounds, strict=False)):
            local = tuple(number - bound.start for number, bound in zip(at, bounds, strict=False))
            inside = tuple(slice(bound.start, bound.stop) for bound in bounds[len(at) :])
            values[inside] = np.asarray(shard.data[local])
    return values

"""A folder in Hugging Face's layout: config.json and safetensors, in one file or in shards with an index."""

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from transformer.config import ConfigError, nearest
from transformer.huggingface.header import Stored, open_regular, read_header, read_json, shown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

TYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
"""Types that float32 holds exactly."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

PORTION = 16 * 2**20
"""Bytes that are read at a time, so that memory holds little besides what is made from them."""

SHORTEST_RUN = 4096
"""Bytes in a row below which whole rows are read and cut: a disk reads no less."""


class Folder:
    """What a folder holds, its headers checked; tensors are read in slices."""

    def __init__(self, path: Path):
        """Raises ConfigError if the folder, its index or a header is not sound. No file outside is opened."""
        self.path = path
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder with config.json and {WEIGHTS}")
        config = self.json("config.json")
        if not isinstance(config, dict):
            raise ConfigError(f"{path / 'config.json'} is not an object")
        self.config: dict[str, Any] = config

    @functools.cached_property
    def tensors(self) -> dict[str, Stored]:
        """All tensors by name."""
        if not self.has(INDEX):
            if not self.has(WEIGHTS):
                self._refuse_others()
            return read_header(self.file(WEIGHTS))[0]
        index = self.json(INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise ConfigError(f"{self.path / INDEX} has no weight_map from names of tensors to files")
        found: dict[str, Stored] = {}
        for name in dict.fromkeys(places.values()):
            if not name.endswith(".safetensors"):
                raise ConfigError(f"{self.path / INDEX}: {shown(name)} is no safetensors file")
            for tensor, stored in read_header(self.file(name, INDEX))[0].items():
                if places.get(tensor) != name:
                    said = (
                        f"the index has it in {shown(places[tensor])}" if tensor in places else "the index has it not"
                    )
                    raise ConfigError(f"{self.path / name}: {shown(tensor)} is in this file, and {said}")
                found[tensor] = stored
        if lacking := sorted(places.keys() - found.keys()):
            listed = ", ".join(f"{shown(name)} in {shown(places[name])}" for name in lacking[:20])
            raise ConfigError(f"{self.path / INDEX} names tensors that are not there: {listed}{_more(lacking)}")
        return found

    def _refuse_others(self) -> None:
        if pickles := sorted(path.name for pattern in PICKLES for path in self.path.glob(pattern)):
            reason = "a pickle runs any code that it holds when it is read"
            raise ConfigError(f"{self.path} has {', '.join(pickles[:5])} and no {WEIGHTS}: {reason}; convert it first")
        names = sorted(path.name for path in self.path.glob("*.safetensors"))
        has = f"it has {', '.join(names[:5])}" if names else "it has no safetensors"
        raise ConfigError(f"{self.path} has neither {WEIGHTS} nor {INDEX}; {has}")

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path / name)

    def json(self, name: str) -> Any:
        return read_json(self.file(name))

    def file(self, name: str, where: str = "") -> Path:
        """Returns the path of a file of this folder. Raises ConfigError if the name, or a link, leads out of it.

        The hub's own cache is allowed its links, from `snapshots/REVISION` to `blobs` beside it.
        """
        said = f"{self.path / where}: " if where else ""
        if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
            raise ConfigError(f"{said}{shown(name)} is not the name of a file in this folder")
        try:
            found = (self.path / name).resolve(strict=True)
        except FileNotFoundError:
            raise ConfigError(f"{said}{self.path / name} is not there") from None
        except (OSError, RuntimeError) as error:  # a link in a circle, a name that is too long
            raise ConfigError(f"{said}{shown(name)}: {getattr(error, 'strerror', None) or error}") from error
        folder = self.path.resolve()
        roots = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
        if not any(found.is_relative_to(root) for root in roots):
            raise ConfigError(f"{said}{shown(name)} is a link that leads out of the folder {self.path}")
        return found


def read_slice(stored: Stored, index: tuple[slice, ...]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields the part of a tensor that `index`, of step 1, cuts out, in portions: which rows of the part, and the values.

    Only the bytes of the part are read, except where they lie in runs too short for a disk.
    """
    if stored.dtype not in TYPES:
        raise ConfigError(
            f"{stored.path}: {stored.name} is {stored.dtype}; parameters are read from {', '.join(TYPES)}"
        )
    dtype = np.dtype(TYPES[stored.dtype])
    shape = stored.shape or (1,)
    rows, *cut = index or (slice(0, 1),)
    width = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
    start, stop = rows.start, rows.stop
    step = max(1, PORTION // max(1, width))
    with open_regular(stored.path) as file:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            portion = _read_rows(file.fileno(), stored, dtype, shape, first, last, cut)
            yield slice(first - start, last - start), portion


def same(one: Stored, other: Stored | None) -> bool:
    """Returns whether two tensors are equal, bit by bit; reads no further than where they differ."""
    if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    whole = tuple(slice(0, size) for size in one.shape)
    return all(
        np.array_equal(a, b) for (_, a), (_, b) in zip(read_slice(one, whole), read_slice(other, whole), strict=True)
    )


def _read_rows(
    descriptor: int, stored: Stored, dtype: Any, shape: tuple[int, ...], first: int, last: int, cut: list[slice]
) -> np.ndarray:
    width = int(np.prod(shape[1:], dtype=np.int64))
    if len(cut) == 1 and (cut[0].stop - cut[0].start) * dtype.itemsize >= SHORTEST_RUN and cut != [slice(0, shape[1])]:
        values = np.empty((last - first, cut[0].stop - cut[0].start), dtype)
        for row in range(first, last):
            offset = stored.offset + (row * width + cut[0].start) * dtype.itemsize
            _fill(descriptor, stored, values[row - first], offset)
        return values
    values = np.empty((last - first, *shape[1:]), dtype)
    _fill(descriptor, stored, values, stored.offset + first * width * dtype.itemsize)
    return values[:, *cut]


def _fill(descriptor: int, stored: Stored, values: np.ndarray, offset: int) -> None:
    flat: Any = values.reshape(-1).view(np.uint8)
    target = memoryview(flat)
    while target:
        count = os.preadv(descriptor, [target], offset)
        if not count:
            raise ConfigError(
                f"{stored.path}: {stored.name}: the file ends at offset {offset:,}: it was cut off meanwhile"
            )
        target, offset = target[count:], offset + count


def _more(names: list[str]) -> str:
    return f" and {len(names) - 20:,} more" if len(names) > 20 else ""


def unsupported(model_type: Any, known: tuple[str, ...]) -> ConfigError:
    """Returns the mistake of a family that there is no table for."""
    guess = nearest(model_type, known) if isinstance(model_type, str) else ""
    return ConfigError(f"model_type = {shown(model_type)} is none of {', '.join(sorted(known))}{guess}")

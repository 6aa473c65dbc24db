"""The header of a safetensors file, believed in nothing: sizes and offsets are checked against the file before any use.

The format is eight bytes with the header's length, the header (JSON: for each tensor its type, shape and place), and the
tensors without a gap between them: https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.config import ConfigError

BYTES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1},
    **{"U16": 2, "I16": 2, "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8},
}
"""Size of an element by type."""

LONGEST = 100_000_000
"""Bytes of the longest header, and of the longest JSON file: the library's own limit."""

DEEPEST = 100
"""Levels of a JSON file: what reads it further on goes into each by a call."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Returns the tensors of a safetensors file by name, and its metadata.

    Raises ConfigError, with the file and the offset, for anything that a sound file has not: nothing is allocated by what the
    header says, only by how long the file is.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(start, "little") if len(start := file.read(8)) == 8 else -1
        if length < 0 or length > min(size - 8, LONGEST):
            said = (
                f"its header would be {length:,} bytes long"
                if length >= 0
                else "it is shorter than the header's length"
            )
            raise ConfigError(f"{path}: at offset 0 of {size:,} bytes: {said}: cut off, or not a safetensors file")
        header = parse_json(file.read(length), f"{path}: the header at offset 8")
    if not isinstance(header, dict):
        raise ConfigError(f"{path}: the header at offset 8 is not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ConfigError(f"{path}: the header at offset 8: __metadata__ is not an object")
    found = {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != end:
            what = "overlaps the tensor before it" if tensor.offset < end else "begins after a gap"
            raise ConfigError(f"{path}: {shown(tensor.name)} at offset {tensor.offset:,} {what}, which ends at {end:,}")
        end += tensor.nbytes
    if end != size:
        raise ConfigError(f"{path}: the tensors end at offset {end:,}, and the file at {size:,}")
    return found, {str(key): str(value) for key, value in metadata.items()}


def _stored(path: Path, name: str, entry: Any, start: int, size: int) -> Stored:
    where = f"{path}: the header at offset 8: {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{where} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ConfigError(f"{where} has the type {shown(dtype)}; known are {', '.join(BYTES)}")
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        # Beyond 2^63 no file reaches, and the product of a hundred such numbers would be as long as a book.
        sound = isinstance(numbers, list) and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        if not sound or len(numbers) > 64 or (what == "data_offsets" and len(numbers) != 2):
            raise ConfigError(f"{where} has the {what} {shown(numbers)}")
    begin, end = offsets
    if not begin <= end <= size - start:
        problem = f"lies at offset {start + begin:,} to {start + end:,}, and the file ends at {size:,}"
        raise ConfigError(f"{where} {problem}: cut off, or damaged")
    stored = Stored(path, name, dtype, tuple(shape), start + begin)
    if stored.nbytes != end - begin:
        problem = (
            f"{dtype} of shape {shown(shape)} has {shown(stored.nbytes)} bytes, and its offsets leave {end - begin:,}"
        )
        raise ConfigError(f"{where} at offset {start + begin:,}: {problem}")
    return stored


def open_regular(path: Path) -> Any:
    """Opens a file that is one: a pipe or a device would wait forever, or never end."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"{path} is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> Any:
    """Returns what a JSON file says; raises ConfigError if it is none, names a key twice, or is absurdly long."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > LONGEST:
            raise ConfigError(f"{path} is longer than {LONGEST:,} bytes")
        content = file.read(size)
    return parse_json(content, str(path))


def parse_json(content: bytes, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{where}: {shown(key)} stands there twice")
            found[key] = value
        return found

    try:
        found = json.loads(content.decode(), object_pairs_hook=once)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    level, depth = [found], 0
    while level := [part for value in level for part in _parts_of(value)]:
        if (depth := depth + 1) > DEEPEST:
            raise ConfigError(f"{where} is nested deeper than {DEEPEST} levels")
    return found


def _parts_of(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def shown(value: Any) -> str:
    """Returns a value from a file for a message, which stays a line whatever the value is."""
    text = repr(value) if not isinstance(value, int) or value.bit_length() < 256 else "a number of many digits"
    return text if len(text) <= 100 else f"{text[:97]}..."

"""A configuration as JSON and back, and the types of its keys in words."""

import dataclasses
import importlib
import json
import os
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformer.config.schema import Config, ConfigError, keys, nearest

T = TypeVar("T")


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON, every key included."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Reads what `to_json` wrote; missing keys take their defaults, unknown ones and wrong types are all reported."""
    try:
        config, problems = from_tree(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return config


def from_tree(tree: Any) -> tuple[Config, list[str]]:
    """Returns the configuration that nested dictionaries stand for, lists taken for tuples and whole numbers for
    floats where those are declared, and a sentence for each mistake in them; what is wrong takes its default."""
    problems: list[str] = []
    return _build(Config, tree, "", problems), problems


def _build(kind: type[T], tree: Any, prefix: str, problems: list[str]) -> T:
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.') or 'the configuration'} must be an object, not {tree!r}")
        return kind()
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            problems.append(f"{prefix}{name} is not a key{nearest(prefix + name, keys())}")
        elif dataclasses.is_dataclass(expected := fields[name].type):
            values[name] = _build(typing.cast(type, expected), value, f"{prefix}{name}.", problems)
        else:
            value = _coerced(expected, value)
            if _accepts(expected, value):
                values[name] = value
            else:
                problems.append(type_problem(prefix + name, value, expected))
    return kind(**values)


def _coerced(expected: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        element = typing.get_args(expected)[0] if typing.get_origin(expected) is tuple else None
        return tuple(_coerced(element, item) for item in value)
    wants_float = expected is float or float in typing.get_args(expected)
    fits = type(value) is int and value.bit_length() < 1024
    return float(value) if wants_float and fits else value


def _accepts(expected: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(a, value) for a in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_accepts(arguments[0], v) for v in value)
    return type(value) is expected


def type_problem(key: str, value: Any, expected: Any) -> str:
    """Returns the sentence for a value that is not of the type `expected`."""
    choices = typing.get_args(expected) if typing.get_origin(expected) is Literal else ()
    return f"{key} = {value!r}: must be {type_name(expected)}{nearest(str(value), choices)}"


def type_name(expected: Any) -> str:
    """Returns a declared type in words."""
    arguments = typing.get_args(expected)
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(expected) is tuple:
        return f"any number of values, each {type_name(arguments[0])}"
    if arguments:
        return " or ".join("None" if argument is types.NoneType else type_name(argument) for argument in arguments)
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[expected]


def place(name: str) -> Any:
    """Returns the path that a user has named: of this machine or, with a scheme, in an object store."""
    if "://" in name:
        return importlib.import_module("transformer.config.stores").remote(name)
    return Path(name).expanduser()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

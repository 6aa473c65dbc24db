"""What trackers have in common: optional packages, and records as they want them."""

import importlib
from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError


def package(key: str, name: str) -> Any:
    """Returns the package `name`, which `tracking.key` needs; raises ConfigError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = "pip install -e '.[tracking]', or set it to False"
        raise ConfigError(f"tracking.{key} = True needs the package {name}: {hint}") from error


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers of a record by `split/name`."""
    names = [name for name, value in record.items() if name != "step" and not isinstance(value, str)]
    return {f"{record['split']}/{name}": float(record[name]) for name in names}


def encodable(text: str) -> str:
    """Returns `text` with lone surrogates spelled out, which UTF-8 has no bytes for."""
    return text.encode(errors="backslashreplace").decode()

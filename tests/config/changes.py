"""Configurations that differ in one key."""

from typing import Any

from transformer.config import Config, replace


def changed(key: str, value: Any, start: Config | None = None) -> Config:
    """Returns the default, or `start`, with another value of a key."""
    section, _, name = key.rpartition(".")
    change: dict[str, Any] = {section: {name: value}} if section else {name: value}
    return replace(start or Config(), **change)

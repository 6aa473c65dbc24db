"""Trackers: where metrics go besides `metrics.jsonl` and the console. Only process 0 makes them."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformer.config import Config


@runtime_checkable
class Tracker(Protocol):
    """Takes the records of `metrics.jsonl` and generated texts."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def text(self, step: int, text: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


TRACKERS: dict[str, tuple[str, str]] = {
    "tensorboard": ("transformer.training.tensorboard", "TensorBoard"),
    "wandb": ("transformer.training.weights_and_biases", "WeightsAndBiases"),
}
"""Module and class of each tracker by the key of `tracking` that switches it on, loaded when it is asked for."""


def trackers(config: Config, workdir: Path, resume_step: int) -> list[Tracker]:
    """Returns the trackers that `config` asks for; raises ConfigError where a package is missing."""
    wanted = [place for key, place in TRACKERS.items() if getattr(config.tracking, key)]
    return [getattr(importlib.import_module(module), name)(config, workdir, resume_step) for module, name in wanted]

"""Trackers: where metrics go besides `metrics.jsonl` and the console. Only process 0 makes them."""

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformer.config import Config, ConfigError


@runtime_checkable
class Tracker(Protocol):
    """Takes the records of `metrics.jsonl` and generated texts."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def text(self, step: int, text: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes events to DIR/tensorboard, without TensorFlow and in the calling thread.

    tensorboardX's own SummaryWriter has a thread, which dies on a full disk and leaves the run waiting for ever.
    """

    def __init__(self, config: Config, workdir: Path, resume_step: int):
        library = package("tensorboard", "tensorboardX")
        self._events, self._text = library.proto.event_pb2, library.summary.text
        directory = workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        self._writer = library.RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns():020d}"))
        self._write(0, file_version="brain.Event:2")
        # Makes TensorBoard hide what earlier files hold of this step and later ones.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(resume_step + 1 if resume_step else 0, session_log=start)
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._events.Event(step=step, wall_time=time.time(), **content).SerializeToString())

    def log(self, record: Mapping[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in numbers(record).items()]
        self._write(record["step"], summary={"value": values})

    def text(self, step: int, text: str) -> None:
        # TensorBoard renders Markdown, where an indented block is literal.
        lines = encodable(text).split("\n")
        self._write(step, summary=self._text("sample", "\n".join("    " + line for line in lines)))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


_WANDB = "transformer.training.weights_and_biases"
TRACKERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": lambda *run: importlib.import_module(_WANDB).WeightsAndBiases(*run),
}
"""Each tracker by the key of `tracking` that switches it on; what needs an extra is loaded when it is asked for."""


def trackers(config: Config, workdir: Path, resume_step: int) -> list[Tracker]:
    """Returns the trackers that `config` asks for; raises ConfigError where a package is missing."""
    return [make(config, workdir, resume_step) for key, make in TRACKERS.items() if getattr(config.tracking, key)]


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

"""Trackers: where metrics go besides `metrics.jsonl` and the console. Only process 0 makes them."""

import dataclasses
import html
import importlib
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformer.config import Config, ConfigError, write_atomically


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
        package = _package("tensorboard", "tensorboardX")
        self._events, self._text = package.proto.event_pb2, package.summary.text
        directory = workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names.
        self._writer = package.RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns():020d}"))
        self._write(0, file_version="brain.Event:2")
        # Makes TensorBoard hide what earlier files hold of this step and later ones.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(resume_step + 1 if resume_step else 0, session_log=start)
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._events.Event(step=step, wall_time=time.time(), **content).SerializeToString())

    def log(self, record: Mapping[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in _numbers(record).items()]
        self._write(record["step"], summary={"value": values})

    def text(self, step: int, text: str) -> None:
        # TensorBoard renders Markdown, where an indented block is literal.
        lines = _encodable(text).split("\n")
        self._write(step, summary=self._text("sample", "\n".join("    " + line for line in lines)))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; a resumed run goes on under the identity kept in DIR/wandb_run_id."""

    def __init__(self, config: Config, workdir: Path, resume_step: int):
        self._package = _package("wandb", "wandb")
        identity = workdir / "wandb_run_id"
        if not identity.exists():
            write_atomically(identity, secrets.token_hex(4))
        try:
            self._run = self._package.init(
                project=config.tracking.wandb_project,
                id=identity.read_text(),
                name=workdir.resolve().name,
                dir=workdir,
                config=dataclasses.asdict(config),
                resume="allow" if resume_step else None,
                settings=self._package.Settings(console="off"),
            )
        except self._package.Error as error:
            raise ConfigError(f"tracking.wandb = True: {error} (WANDB_MODE=offline needs no account)") from error

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self._run.starting_step:  # steps done again after a crash, which the service already has
            self._run.log(values, step=step)

    def log(self, record: Mapping[str, Any]) -> None:
        self._log(record["step"], _numbers(record))

    def text(self, step: int, text: str) -> None:
        page = f"<pre>{html.escape(_encodable(text))}</pre>"
        self._log(step, {"sample": self._package.Html(page, inject=False)})

    def sync(self) -> None:
        """Nothing to do: a process of its own writes whatever it is given."""

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Config, Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
"""Each tracker by the key of `tracking` that switches it on."""


def trackers(config: Config, workdir: Path, resume_step: int) -> list[Tracker]:
    """Returns the trackers that `config` asks for; raises ConfigError where a package is missing."""
    return [make(config, workdir, resume_step) for key, make in TRACKERS.items() if getattr(config.tracking, key)]


def _package(key: str, name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = 'install the extra `tracking` (pip install "transformer[tracking]"), or set it to False'
        raise ConfigError(f"tracking.{key} = True needs the package {name}: {hint}") from error


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    names = [name for name, value in record.items() if name != "step" and not isinstance(value, str)]
    return {f"{record['split']}/{name}": float(record[name]) for name in names}


def _encodable(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()

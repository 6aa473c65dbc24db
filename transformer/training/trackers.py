"""Trackers: where metrics go besides `metrics.jsonl` and the console. Only process 0 makes them."""

import dataclasses
import html
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformer.config import Config, ConfigError, write_atomically


@runtime_checkable
class Tracker(Protocol):
    """Takes records as they are written to `metrics.jsonl`, and generated samples."""

    def log(self, record: Mapping[str, Any]) -> None: ...
    def text(self, step: int, text: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Writes TensorBoard events to DIR/tensorboard, without TensorFlow.

    Written through `RecordWriter` because `SummaryWriter` hands events to a thread, which dies on a full disk and
    leaves the training waiting for its queue for ever.
    """

    def __init__(self, config: Config, workdir: Path, resume_step: int):
        try:
            from tensorboardX import RecordWriter
            from tensorboardX.proto import event_pb2
        except ImportError as error:
            raise _missing("tensorboard", "tensorboardX") from error
        from tensorboardX.summary import text

        self._event, self._text = event_pb2.Event, text
        directory = workdir / "tensorboard"
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a directory in the order of their names: the start of each run, zero-padded.
        self._writer = RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns():020d}"))
        self._write(0, file_version="brain.Event:2")
        # "Purge": tells TensorBoard to hide the events of this and later steps that stand in earlier files.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(resume_step + 1 if resume_step else 0, session_log=start)
        self._writer.flush()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write(self._event(step=step, wall_time=time.time(), **content).SerializeToString())

    def log(self, record: Mapping[str, Any]) -> None:
        values = [{"tag": name, "simple_value": value} for name, value in _numbers(record).items()]
        self._write(record["step"], summary={"value": values})

    def text(self, step: int, text: str) -> None:
        # TensorBoard renders Markdown, in which an indented block is literal text.
        lines = text.encode(errors="backslashreplace").decode().split("\n")
        self._write(step, summary=self._text("sample", "\n".join("    " + line for line in lines)))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.flush()
        self._writer.close()


class WeightsAndBiases:
    """Logs to Weights & Biases; DIR/wandb_run_id makes a resumed run continue the same run there."""

    def __init__(self, config: Config, workdir: Path, resume_step: int):
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", "wandb") from error
        self._wandb = wandb
        id_file = workdir / "wandb_run_id"
        if not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4))
        try:
            self._run = wandb.init(
                project=config.tracking.wandb_project,
                id=id_file.read_text().strip(),
                name=workdir.resolve().name,
                dir=workdir,
                config=dataclasses.asdict(config),
                resume="allow" if resume_step else None,
                settings=wandb.Settings(console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(f"tracking.wandb = True: {error} (WANDB_MODE=offline needs no account)") from error

    def log(self, record: Mapping[str, Any]) -> None:
        self._log(record["step"], _numbers(record))

    def text(self, step: int, text: str) -> None:
        text = html.escape(text.encode(errors="backslashreplace").decode())
        self._log(step, {"sample": self._wandb.Html(f"<pre>{text}</pre>", inject=False)})

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if step >= self._run.starting_step:  # after a crash the service already has the same values of earlier steps
            self._run.log(dict(values), step=step)

    def sync(self) -> None:
        """Nothing to do: a process of its own writes what it is given."""

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Config, Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
"""Each tracker by the key of `tracking` that switches it on."""


class Trackers:
    """Several trackers as one."""

    def __init__(self, members: list[Tracker]):
        self.members = members

    def log(self, record: Mapping[str, Any]) -> None:
        for tracker in self.members:
            tracker.log(record)

    def text(self, step: int, text: str) -> None:
        for tracker in self.members:
            tracker.text(step, text)

    def sync(self) -> None:
        for tracker in self.members:
            tracker.sync()

    def close(self) -> None:
        for tracker in self.members:
            tracker.close()


def trackers(config: Config, workdir: Path, resume_step: int) -> Trackers:
    """Returns the trackers that `config` asks for; raises ConfigError where a package is missing."""
    return Trackers(
        [make(config, workdir, resume_step) for key, make in TRACKERS.items() if getattr(config.tracking, key)]
    )


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: value for name, value in record.items() if name != "step" and not isinstance(value, str)}
    return {f"{record['split']}/{name}": float(value) for name, value in numbers.items()}


def _missing(key: str, package: str) -> ConfigError:
    return ConfigError(
        f"tracking.{key} = True needs the package {package}: install the extra `tracking` "
        f'(pip install "transformer[tracking]"), or set tracking.{key} to False'
    )

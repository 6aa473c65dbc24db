"""Events for TensorBoard."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.config import Config
from transformer.training.tracked import encodable, numbers, package


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

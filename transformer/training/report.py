"""Everything a run tells the world: files, trackers and console. Only one process does; in the others it is silent."""

import importlib
from typing import Any

from transformer.checkpointing.run import Place
from transformer.config import Config
from transformer.objectives import objective_of
from transformer.training.metrics import SCORES, MetricsLog
from transformer.training.progress import Progress
from transformer.training.trackers import trackers


class Report:
    """Opened at the step from which the run goes on: what was written after that step is dropped, and written again."""

    def __init__(self, config: Config, place: Place, start_step: int, is_writer: bool):
        self._config, self._place, self._writes, workdir = config, place, is_writer, place.files
        if is_writer:
            self._progress = Progress(config.train.num_steps, start_step, None, config.train.log_every_steps)
            self._metrics = MetricsLog(workdir / "metrics.jsonl", start_step)
            self._samples = MetricsLog(workdir / "samples.jsonl", start_step)
            self._trackers = trackers(config, workdir, start_step)

    def __enter__(self) -> "Report":
        if self._writes:
            self._progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._writes:
            self._progress.__exit__(*error)
            for sink in (self._metrics, self._samples, *self._trackers):
                sink.close()

    def train(self, record: dict[str, Any], mfu: float | None) -> None:
        """Takes the metrics of one step."""
        if self._writes:
            self._record(record)
            self._progress.update(record if mfu is None else record | {"mfu": mfu})

    def _record(self, record: dict[str, Any]) -> None:
        self._metrics.write(record)
        for tracker in self._trackers:
            tracker.log(record)

    def validation(self, record: dict[str, Any]) -> None:
        """Takes the result of a validation, and draws the loss so far."""
        if self._writes:
            self._record(record)
            names = {"loss": "loss", "bits_per_byte": "bits a byte", "accuracy": "accuracy", **SCORES}
            values = [f"{label} {record[name]:.4f}" for name, label in names.items() if name in record]
            self._progress.message(f"step {record['step']}: validation {', '.join(values)}")
            if self._config.tracking.plot:
                # Loaded here, for it is an extra's.
                plots = importlib.import_module("transformer.training.plots")
                files = self._place.files
                plots.draw_loss(
                    files / "metrics.jsonl", files / "loss.png", files.name, objective_of(self._config).UNIT
                )

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Takes a text that the model wrote."""
        if self._writes:
            self._samples.write({"step": step, "split": "sample", "prompt": prompt, "text": text})
            for tracker in self._trackers:
                tracker.text(step, prompt + text)
            self._progress.message(f"step {step}: sample\n{prompt}{text}\n")

    def message(self, text: str) -> None:
        if self._writes:
            self._progress.message(text)

    def sync(self) -> None:
        """Returns when all lines are on disk, or in the store: to be called before a checkpoint of the same step is written."""
        if self._writes:
            for sink in (self._metrics, self._samples, *self._trackers):
                sink.sync()
            self._place.upload()

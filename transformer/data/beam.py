"""Preparing on many machines: Apache Beam runs the tasks that `workers.Workers` else gives to processes (extra `beam`).

Only where a task runs is Beam's. Which documents make a shard, its bytes and the file it becomes are decided as ever,
so the shards are those of a local run, and each can be taken up by the other way of preparing. Documents are read and
results written by path: `data.cache_dir` and the sources must lie where every worker sees them under the same name.
"""

import importlib
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformer.config import Config, ConfigError, nearest, write_atomically
from transformer.data import sources
from transformer.data.prepare import make
from transformer.data.prepared import Prepared, load_prepared
from transformer.data.workers import Result, Task, Workers

RUNNERS = {
    # This machine, in Python: Beam's own DirectRunner first tries to download a program that does the same.
    "direct": "apache_beam.runners.portability.fn_api_runner.fn_runner.FnApiRunner",
    "flink": "FlinkRunner",
    "spark": "SparkRunner",
    "dataflow": "DataflowRunner",
}


def prepare(config: Config, runner: str, options: Sequence[str] = (), show_progress: bool = True) -> Prepared:
    """Prepares as `prepare.prepare` does, by a runner of Beam; `options` are the runner's own, `name=value` or `name`.

    Raises ConfigError also for a runner or an option that does not exist, and where Beam is not installed.
    """
    with BeamWorkers(config, runner, options, show_progress) as workers:
        return load_prepared(*make(config, workers))


class BeamWorkers(Workers):
    """Runs tasks as the elements of a pipeline. Their results come back as files, for a runner returns no values."""

    def __init__(self, config: Config, runner: str, options: Sequence[str], show_progress: bool):
        super().__init__(config.data.num_workers, show_progress)
        self._runner, self._options = runner, _pipeline_options(runner, options)
        self._root = sources.cache_dir(config) / "beam"

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], what: str) -> list[Result]:
        if len(tasks) == 1:
            return super().map(function, tasks, what)
        self.say(f"{what}: {len(tasks)} tasks for Beam's {self._runner} runner")
        self._root.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(dir=self._root))
        try:
            self._run(function, tasks, directory)
            results = [pickle.loads((directory / str(number)).read_bytes()) for number in range(len(tasks))]
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        if mistakes := [result for result in results if isinstance(result, ConfigError)]:
            raise mistakes[0]
        return results

    def _run(self, function: Callable[[Task], Result], tasks: Sequence[Task], directory: Path) -> None:
        beam = importlib.import_module("apache_beam")
        elements = [(number, pickle.dumps(task)) for number, task in enumerate(tasks)]
        with beam.Pipeline(options=self._options) as pipeline:
            # Reshuffled, or the runner would fuse the list and the work on it into a single task.
            numbered: Any = pipeline | "tasks" >> beam.Create(elements) | "spread" >> beam.Reshuffle()
            _ = numbered | "work" >> beam.Map(run_task, pickle.dumps(function), str(directory))


def run_task(element: tuple[int, bytes], function: bytes, directory: str) -> None:
    """Does one task and leaves its result in `directory`; done twice, as runners may, it writes the same again."""
    number, task = element
    if not Path(directory).is_dir():
        problem = f"the worker {socket.gethostname()} does not see {directory}"
        raise RuntimeError(f"{problem}: data.cache_dir must be on a file system that all workers share")
    try:
        result = pickle.loads(function)(pickle.loads(task))
    except ConfigError as error:  # a document that cannot be used: told to the user, not tried again
        result = error
    write_atomically(Path(directory) / str(number), pickle.dumps(result))


def _pipeline_options(runner: str, options: Sequence[str]) -> Any:
    if runner not in RUNNERS:
        raise ConfigError(
            f"--runner = {runner!r}: must be one of {', '.join(RUNNERS)}{nearest(runner, tuple(RUNNERS))}"
        )
    try:
        kind = importlib.import_module("apache_beam.options.pipeline_options").PipelineOptions
    except ImportError as error:
        raise ConfigError(f"--runner = {runner!r} needs the package apache-beam: pip install -e '.[beam]'") from error
    # Beam only warns of an option that it does not know.
    known = tuple(kind([]).get_all_options())
    names = [option.partition("=")[0] for option in options]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError([f"--runner-options: Beam has no option {name!r}{nearest(name, known)}" for name in unknown])
    return kind([f"--runner={RUNNERS[runner]}", *(f"--{option}" for option in options)])

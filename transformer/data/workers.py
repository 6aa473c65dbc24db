"""Work done by several processes, with progress shown: a bar on a terminal, lines elsewhere."""

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


class Workers:
    """A pool of processes that starts when first needed and leaves no process behind, even if killed."""

    def __init__(self, num_workers: int, show_progress: bool):
        self.num_workers, self.show_progress = num_workers or os.cpu_count() or 1, show_progress
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], what: str) -> list[Result]:
        """Returns the results in the order of the tasks; the first exception ends the work."""
        if self.num_workers == 1 or len(tasks) == 1:
            return list(self._shown(map(function, tasks), len(tasks), what))
        if self._pool is None:
            # Not fork: the caller may have threads, JAX's among them.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.num_workers, context, _start_worker)
        return list(self._shown(self._pool.map(function, tasks), len(tasks), what))

    def say(self, message: str) -> None:
        """Prints a line where progress is shown."""
        if self.show_progress:
            print(message, file=sys.stderr, flush=True)

    def _shown(self, results: Iterable[Any], total: int, what: str) -> Iterator[Any]:
        if self.show_progress and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            results = track(results, what, total, console=Console(stderr=True))
        for done, result in enumerate(results, start=1):
            if not sys.stderr.isatty() and done * 10 // total > (done - 1) * 10 // total:
                self.say(f"{what}: {done} of {total}")
            yield result


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A worker waits for tasks on a pipe that it holds open itself, so it would outlive a killed parent.
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()

"""Work done by several processes, with progress shown: a bar on a terminal, lines elsewhere."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

SECONDS_BETWEEN_LINES = 5.0


class Workers:
    """A pool of processes that starts when first needed and leaves no process behind, even if killed."""

    def __init__(self, num_workers: int, show_progress: bool):
        self.num_workers = num_workers or os.cpu_count() or 1
        self.show_progress = show_progress
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Task], Result], tasks: Sequence[Task], what: str) -> list[Result]:
        """Returns the results in the order of the tasks; the first exception ends the work."""
        if self.num_workers > 1 and len(tasks) > 1:
            results: Iterator[Result] = self._started().map(function, tasks)
        else:
            results = map(function, tasks)
        return list(self._shown(results, len(tasks), what))

    def say(self, message: str) -> None:
        """Prints a line where progress is shown."""
        if self.show_progress:
            print(message, file=sys.stderr, flush=True)

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            # Not fork: the caller may have threads, JAX's among them.
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.num_workers, context, _start_worker)
        return self._pool

    def _shown(self, results: Iterator[Any], total: int, what: str) -> Iterator[Any]:
        if not self.show_progress:
            yield from results
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import track

            yield from track(results, what, total, console=Console(stderr=True))
        else:
            shown = time.monotonic()
            for done, result in enumerate(results, start=1):
                if done == total or time.monotonic() - shown > SECONDS_BETWEEN_LINES:
                    shown = time.monotonic()
                    self.say(f"{what}: {done} of {total}")
                yield result


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal; the parent alone reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    with contextlib.suppress(InterruptedError):
        parent.join()
    os._exit(1)

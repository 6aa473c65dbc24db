"""Ends a process in which nothing happens any more: a collective whose peer is stuck, a device, a file system."""

import faulthandler
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePath

from transformer.parallel import HUNG

COMPILATION_SECONDS = 1800
"""Least silence that is allowed where something may have to be compiled first."""


class Watchdog:
    """Watches from its first `beat` on, in a thread, until the silence between two is longer than allowed.

    It needs Python's global lock, as every thread does. It counts its own wakings, so that time for which the whole process
    is suspended is no silence.
    """

    def __init__(self, seconds: int, directory: PurePath, index: int, leave: Callable[[int, str], None]):
        """Stacks are written into a `directory` of this machine, or of its temporary files if that is in an object store.

        `leave` is called with HUNG and a reason, from the thread, and has to end the process."""
        local = directory if isinstance(directory, Path) else Path(tempfile.gettempdir())
        self._seconds, self._path, self._leave = seconds, local / f"hung.{index}.txt", leave
        self._doing, self._allowed, self._silent = "", float("inf"), 0.0
        self._over, self._writing = threading.Event(), threading.Lock()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str, compiles: bool = False) -> None:
        """Says that something has happened, and what is being done now."""
        self._doing, self._silent = doing, 0.0
        self._allowed = max(self._seconds, COMPILATION_SECONDS) if compiles else self._seconds

    def stop(self) -> None:
        self._over.set()

    def dump(self) -> None:
        """Writes the stacks of all threads to standard error and to a file of the run directory, once."""
        if not self._writing.acquire(blocking=False):
            return
        faulthandler.dump_traceback(file=2, all_threads=True)
        # What hangs may be the directory's file system.
        writer = threading.Thread(target=self._write, daemon=True)
        writer.start()
        writer.join(10)

    def _write(self) -> None:
        with self._path.open("w") as file:
            file.write(f"{self._doing}, silent for {self._silent:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file=file, all_threads=True)

    def _watch(self) -> None:
        interval = min(5.0, self._seconds / 10)
        while not self._over.wait(interval):
            self._silent += interval
            if self._silent > self._allowed:
                self.dump()
                silence = f"hung for {self._allowed} s {self._doing}"
                self._leave(HUNG, f"{silence}; the stacks of all threads are above and in {self._path}")
                return

"""What ends a run that cannot go on, in all of its processes alike: errors, peers that are lost, a watchdog."""

import hashlib
import os
import re
import sys
import traceback
from pathlib import Path, PurePath
from types import TracebackType

from transformer.config import Config, ConfigError
from transformer.parallel.peers import join
from transformer.parallel.watchdog import Watchdog

_NETWORK = re.compile(
    r"gloo|nccl|rccl|megascale|connection|socket|unavailable|deadline|heartbeat|barrier|coordination|peer", re.I
)
"""What an error says that may come from the death of another process."""


class Guard:
    """Entered around a run."""

    def __init__(self, config: Config, workdir: PurePath):
        self._peers = join(config.parallel.heartbeat_seconds)
        self._watchdog: Watchdog | None = None
        if config.parallel.watchdog_seconds:
            index = self._peers.index if self._peers else 0
            self._watchdog = Watchdog(config.parallel.watchdog_seconds, workdir, index, self._leave)
            if self._peers:
                self._peers.on_hung = self._watchdog.dump

    def __enter__(self) -> "Guard":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._watchdog:
            self._watchdog.stop()
        if error is None or self._peers is None:
            return
        status, reason = _reported(error)
        if status == 1 and _NETWORK.search(str(error)):
            # Another process may have died: whoever finds out ends this one, and names it.
            self._peers.wait_for_news()
        self._peers.leave(status, reason)

    def agree(self, **facts: str) -> None:
        """Waits for all processes; raises ConfigError in all if they hold different facts."""
        if self._peers:
            self._peers.agree({name.replace("_", " "): value for name, value in facts.items()})

    def meet(self, path: PurePath) -> None:
        """Waits for all processes, process 0 having written a file; raises ConfigError if not all of them see it.

        A path in an object store is the same for all.
        """
        if self._peers:
            self._peers.agree({})
        if self._peers and isinstance(path, Path):
            text = path.read_text() if path.exists() else "absent"
            shown = text if text == "absent" else f"present ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
            self._peers.agree({f"{path} (--workdir has to be one directory for all)": shown})

    def beat(self, step: int, doing: str = "in a step", compiles: bool = False) -> None:
        """Tells the watchdog that something has happened after `step`, and what is being done now."""
        if self._watchdog:
            self._watchdog.beat(f"{doing} after step {step}", compiles)

    def _leave(self, status: int, reason: str) -> None:
        if self._peers:
            self._peers.quit(status, reason)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(status)


def _reported(error: BaseException) -> tuple[int, str]:
    """Returns the exit status that an error will have (`transformer.arguments.exit_status`), and what it says."""
    if isinstance(error, ConfigError):
        return 2, "; ".join(error.problems)
    if isinstance(error, SystemExit):
        return int(error.code or 0), "stopped by a signal before the first step; the last checkpoint is the newest"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    return 1, traceback.format_exception_only(error)[-1].strip()

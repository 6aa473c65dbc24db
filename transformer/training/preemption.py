"""Signals: the first asks the loop to save and leave, the second leaves at once."""

import math
import os
import signal
import threading
import time
from types import FrameType

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""128 + number, as shells report it, so that Slurm and Kubernetes see an interruption and start the run again."""


class Signals:
    """Catches SIGTERM and SIGINT while it is entered.

    Python runs a handler only between two of its own instructions, which may be minutes apart while the main thread
    compiles or waits for a device. So the second signal reaches a thread of its own, through a pipe.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in EXIT_STATUS:
            self._previous[number] = signal.signal(number, self._handle)
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer)
        threading.Thread(target=_leave_at_second, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._previous_writer)
        os.close(self._writer)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def cast(self) -> None:
        """Alone, a process has nobody to ask (`voting.Vote`)."""

    def read(self, vote: None) -> int:
        return self.received

    def defer(self) -> None:
        """From now on there is something to save: the first signal is only noted."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if not self._deferred:
            raise SystemExit(128 + number)


def _leave_at_second(reader: int) -> None:
    """Reads the numbers of signals from a pipe, a byte each, until it is closed; exits at the second that counts."""
    first = math.inf
    while number := os.read(reader, 1):
        if number[0] in EXIT_STATUS:
            # `timeout` and job schedulers send the same signal to the process and to its group, which is one signal.
            if time.monotonic() - first > 0.3:
                os._exit(128 + number[0])
            first = min(first, time.monotonic())
    os.close(reader)

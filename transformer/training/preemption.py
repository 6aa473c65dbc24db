"""Signals: the first asks the loop to save and leave, the second leaves at once."""

import math
import os
import signal
import threading
import time
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


class Vote:
    """Lets several processes agree on the step at which to stop: a signal to any one stops all at the same step.

    Every process casts its signal with every step; the largest comes back with that step's metrics, which all read
    at the same point of the loop.
    """

    def __init__(self, mesh: Mesh, signals: Signals):
        self._signals = signals
        self._alone = jax.process_count() == 1
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self) -> jax.Array | None:
        """Starts to find the largest signal that any process has received by now."""
        if self._alone:
            return None
        values = np.full((self._size,), self._signals.received, np.int32)
        with jax.transfer_guard_host_to_device("allow"):
            votes = jax.make_array_from_callback((self._size,), self._layout, lambda index: values[index])
        return self._largest(votes)

    def read(self, vote: jax.Array | None) -> int:
        """Returns the outcome of a vote; a single process need not wait for one."""
        return self._signals.received if vote is None else int(jax.device_get(vote))

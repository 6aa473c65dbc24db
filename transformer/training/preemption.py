"""Signals: the first asks the loop to save and leave, the second leaves at once."""

import os
import signal
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

EXIT_STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""128 + number, as shells report it, so that Slurm and Kubernetes see an interruption and start the run again."""


class Signals:
    """Catches SIGTERM and SIGINT while it is entered."""

    def __init__(self) -> None:
        self.received = 0
        self._deferred = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        for number in EXIT_STATUS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def defer(self) -> None:
        """From now on there is something to save: the first signal is only noted."""
        self._deferred = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
        if not self._deferred:
            raise SystemExit(128 + number)


class Vote:
    """Lets several processes agree on the step at which to stop: a signal to any one stops all at the same step.

    Every process casts its signal with every step; the largest comes back with that step's metrics, which all read
    at the same point of the loop.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self, received: int) -> jax.Array | int:
        """Returns the largest signal of all processes, on its way."""
        if self._alone:
            return received
        values = np.full((self._size,), received, np.int32)
        with jax.transfer_guard_host_to_device("allow"):
            votes = jax.make_array_from_callback((self._size,), self._layout, lambda index: values[index])
        return self._largest(votes)

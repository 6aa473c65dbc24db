"""Signals of several processes: all stop at the same step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from transformer.training.preemption import Signals


class Vote:
    """Lets several processes agree on the step at which to stop: a signal to any one stops all at the same step.

    Every process casts its signal with every step; the largest comes back with that step's metrics, which all read
    at the same point of the loop.
    """

    def __init__(self, mesh: Mesh, signals: Signals):
        self._signals = signals
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def cast(self) -> jax.Array:
        """Starts to find the largest signal that any process has received by now."""
        values = np.full((self._size,), self._signals.received, np.int32)
        with jax.transfer_guard_host_to_device("allow"):
            votes = jax.make_array_from_callback((self._size,), self._layout, lambda index: values[index])
        return self._largest(votes)

    def read(self, vote: jax.Array) -> int:
        """Waits for the outcome of a vote."""
        return int(jax.device_get(vote))

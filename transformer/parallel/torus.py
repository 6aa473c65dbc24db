"""Where each device of an accelerator stands in the mesh."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from transformer.config import ConfigError


def arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as an array of the mesh's shape, so that neighbours on the mesh are neighbours on the torus.

    Slices of a TPU pod are apart in the first axis, `replica`: nothing else goes over the network between them. Raises
    ConfigError where it is no multiple of their number.
    """
    slices = {getattr(device, "slice_index", None) for device in devices} if devices[0].platform == "tpu" else {None}
    count = len(slices)
    if count == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % count:
        raise ConfigError(f"parallel.replica = {shape[0]}: must be a multiple of the {count} slices of the pod")
    within, across = (shape[0] // count, *shape[1:]), (count, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)

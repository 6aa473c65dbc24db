"""Flags of XLA's compilers for accelerators, each with its reason. What the user has set himself wins.

They are read when JAX first touches a device, and decide nothing about results but the order of sums.
"""

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

GPU = {
    # Collectives begin as early and end as late as their data allow, with products in between; off by default.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
    # Inside the loop over layers, the next layer's parameters are gathered, and the last one's gradients scattered or
    # summed, while this one computes: a scan is otherwise a wall that no scheduler moves a collective over.
    "xla_gpu_enable_pipelined_all_gather": "true",
    "xla_gpu_enable_pipelined_reduce_scatter": "true",
    "xla_gpu_enable_pipelined_all_reduce": "true",
    # Collectives are launched before products that wait for the same cores, or they would begin when those end.
    "xla_gpu_enable_highest_priority_async_stream": "true",
}
"""For `XLA_FLAGS`."""

TPU = {
    # Gradients that are summed over data-parallel devices are summed behind the backward pass, of whatever size.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
"""For `LIBTPU_INIT_ARGS`, whatever the chip."""

TPU_V5E = {
    # Collectives run in steps beside the products around them, those that gather parameters included. libtpu compiles
    # nothing for other chips with these: they have other means, which it uses without being told.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
"""The same, for a TPU v5e besides."""

_PCI = {"0x0063": "v5e", "0x0062": "v5p", "0x005e": "v4", "0x006f": "v6e"}
"""Device numbers of Google's chips, as JAX has them in `hardware_utils`."""


def set_flags(accelerator: Literal["gpu", "tpu"], environ: MutableMapping[str, str], chip: str | None = None) -> None:
    """Adds an accelerator's flags to the variable that its compiler reads; `chip`: which TPU, None: the one in here."""
    variable, flags = {"gpu": ("XLA_FLAGS", GPU), "tpu": ("LIBTPU_INIT_ARGS", TPU)}[accelerator]
    if accelerator == "tpu" and (chip or _tpu()) == "v5e":
        flags = flags | TPU_V5E
    environ[variable] = merged(flags, environ.get(variable, ""))


def _tpu() -> str | None:
    """Returns the name of the TPU in this machine, None if there is none that is known."""
    found = (_PCI.get(file.read_text().strip()) for file in Path("/sys/bus/pci/devices").glob("*/device"))
    return next((name for name in found if name), None)


def merged(flags: Mapping[str, str], given: str) -> str:
    """Returns `given`, with those of our flags before it that it does not name."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [f"--{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join([*ours, given]).strip()

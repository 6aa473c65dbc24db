"""Flags of XLA's compilers for accelerators, each with its reason. What the user has set himself wins.

They are read when JAX first touches a device, and decide nothing about results but the order of sums.
"""

from collections.abc import Mapping, MutableMapping
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
    # Collectives run in steps beside the products around them, those that gather parameters included.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    # Gradients that are summed over data-parallel devices are summed behind the backward pass, of whatever size.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
"""For `LIBTPU_INIT_ARGS`."""


def set_flags(accelerator: Literal["gpu", "tpu"], environ: MutableMapping[str, str]) -> None:
    """Adds an accelerator's flags to the variable that its compiler reads."""
    variable, flags = {"gpu": ("XLA_FLAGS", GPU), "tpu": ("LIBTPU_INIT_ARGS", TPU)}[accelerator]
    environ[variable] = merged(flags, environ.get(variable, ""))


def merged(flags: Mapping[str, str], given: str) -> str:
    """Returns `given`, with those of our flags before it that it does not name."""
    named = {word.lstrip("-").partition("=")[0] for word in given.split()}
    ours = [f"--{name}={value}" for name, value in flags.items() if name not in named]
    return " ".join([*ours, given]).strip()

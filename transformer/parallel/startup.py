"""What must be settled before JAX touches a device: allocator or compiler, simulated devices, processes, cache."""

import ctypes
import importlib
import os
import platform
from pathlib import Path

from transformer.config import Config

_started = False


def start(config: Config) -> None:
    """Prepares this process for `config`; call it before anything imports JAX. Later calls do nothing."""
    global _started
    if _started:
        return
    _started = True
    if config.parallel.cpu_devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        # XLA ends a process whose simulated devices do not meet within 40 seconds, which a busy machine may need.
        flags = f"--xla_force_host_platform_device_count={config.parallel.cpu_devices}"
        flags += " --xla_cpu_collective_call_terminate_timeout_seconds=300"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
        # Simulated devices wait for each other inside XLA's thread pool, which by default has a thread a core
        # and deadlocks when more devices than cores meet in a collective.
        os.environ.setdefault("NPROC", str(max(16, 2 * config.parallel.cpu_devices)))
    if accelerator := _accelerator():
        importlib.import_module("transformer.parallel.xla_flags").set_flags(accelerator, os.environ)
    else:
        _keep_freed_memory()
    several = ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NODELIST", "TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
    if config.parallel.coordinator or accelerator == "tpu" or any(name in os.environ for name in several):
        importlib.import_module("transformer.parallel.processes").join(config, os.environ, accelerator)

    import jax

    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _accelerator() -> str | None:
    devices = {"/dev/nvidia0": "gpu", "/dev/kfd": "gpu", "/dev/accel0": "tpu", "/dev/vfio/0": "tpu"}
    found = [kind for device, kind in devices.items() if Path(device).exists()]
    return found[0] if found and os.environ.get("JAX_PLATFORMS") != "cpu" else None


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory.

    XLA allocates the temporary buffers of a step anew every time; by default glibc gives them back to the
    system in between, and a fifth of a step on the CPU goes to page faults. Resident memory then stays at its peak.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)

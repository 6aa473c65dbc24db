"""What must be settled before JAX touches a device: allocator, simulated devices, processes, compilation cache."""

import ctypes
import os
import platform
from collections.abc import Mapping
from pathlib import Path

from transformer.config import Config, ConfigError

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
    if not _has_accelerator():
        _keep_freed_memory()

    import jax

    if config.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache_dir).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    processes = find_processes(config, os.environ)
    if processes is not None:
        jax.distributed.initialize(**processes)


def find_processes(config: Config, environ: Mapping[str, str]) -> dict | None:
    """Returns the arguments of `jax.distributed.initialize`, or None for a single process.

    In order of precedence: the configuration; `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` (for Kubernetes' indexed jobs, `JOB_COMPLETION_INDEX` stands for the last); Slurm, and
    the hosts of a TPU slice, which JAX itself knows how to read. Raises ConfigError for half a set of variables.
    """
    parallel = config.parallel
    if parallel.coordinator:
        return _processes(parallel.coordinator, parallel.num_processes, parallel.process_id)
    in_slurm_step = "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1
    several_tpu_hosts = "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    known_to_jax = in_slurm_step or several_tpu_hosts
    if "JAX_COORDINATOR_ADDRESS" in environ and ("JAX_NUM_PROCESSES" in environ or not known_to_jax):
        in_job = "JAX_PROCESS_ID" not in environ and "JOB_COMPLETION_INDEX" in environ
        names = ("JAX_NUM_PROCESSES", "JOB_COMPLETION_INDEX" if in_job else "JAX_PROCESS_ID")
        values = [environ.get(name, "") for name in names]
        problem = " = {!r}: must be a whole number, for JAX_COORDINATOR_ADDRESS is set"
        problems = [name + problem.format(v) for name, v in zip(names, values, strict=True) if not v.isdecimal()]
        if problems:
            raise ConfigError(problems)
        count, index = map(int, values)
        if index >= count:
            raise ConfigError(f"{names[1]} = {index}: must be below JAX_NUM_PROCESSES = {count}")
        return _processes(environ["JAX_COORDINATOR_ADDRESS"], count, index)
    return {} if known_to_jax else None


def _processes(address: str, count: int, index: int) -> dict:
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _has_accelerator() -> bool:
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd"))


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory.

    XLA allocates the temporary buffers of a step anew every time; by default glibc gives them back to the
    system in between, and a fifth of a step on the CPU goes to page faults. Resident memory then stays at its peak.
    """
    if platform.system() == "Linux" and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, value in ((-4, 0), (-1, -1), (-8, 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX
            mallopt(parameter, value)

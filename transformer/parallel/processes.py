"""Where the other processes of a run are, if it has several."""

from collections.abc import Mapping

from transformer.config import Config, ConfigError


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

"""Where the other processes of a run are, if it has several."""

import re
import urllib.request
from collections.abc import Callable, Mapping

from transformer.config import Config, ConfigError

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def join(config: Config, environ: Mapping[str, str], accelerator: str | None) -> None:
    """Finds the other processes, if there are any, and meets them; call it before anything imports JAX.

    Raises ConfigError, in all processes, if they hold different configurations, code or packages.
    """
    arguments = find_processes(config, environ, _metadata if accelerator == "tpu" else _nothing)
    if arguments is None:
        return
    from transformer.parallel.supervisor import Place, supervise, tell

    writer = supervise()
    if "coordinator_address" in arguments:
        tell(writer, Place(arguments["coordinator_address"], arguments["process_id"], arguments["num_processes"]))

    import jax

    from transformer.parallel import agreement, peers

    seconds = config.parallel.heartbeat_seconds
    jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=peers.fallback_seconds(seconds))
    if joined := peers.join(seconds):
        tell(writer, Place(joined.address, joined.index, joined.count, joined=True))
        joined.agree(agreement.facts_of(config))


def _nothing(name: str) -> str:
    return ""


def find_processes(
    config: Config, environ: Mapping[str, str], metadata: Callable[[str], str] = _nothing
) -> dict | None:
    """Returns the arguments of `jax.distributed.initialize`, or None for a single process.

    In order of precedence: the configuration; `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` (for Kubernetes' indexed jobs, `JOB_COMPLETION_INDEX` stands for the last); Slurm, and
    the hosts of TPU slices, which JAX itself knows how to read. `metadata` returns what the server of a TPU VM says of
    itself under a name, or nothing. Raises ConfigError for half a set of variables.
    """
    parallel = config.parallel
    if parallel.coordinator:
        return _processes(parallel.coordinator, parallel.num_processes, parallel.process_id, environ)
    in_slurm_step = "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1
    known_to_jax = in_slurm_step or _several_tpu_hosts(environ, metadata)
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
        return _processes(environ["JAX_COORDINATOR_ADDRESS"], count, index, environ)
    return _devices(environ) if known_to_jax else None


def _processes(address: str, count: int, index: int, environ: Mapping[str, str]) -> dict:
    found = {"coordinator_address": address, "num_processes": count, "process_id": index}
    if "SLURM_STEP_NODELIST" not in environ:
        # There is nothing left to find out, but JAX would look for a cluster all the same.
        found["cluster_detection_method"] = "deactivate"
    return found | _devices(environ)


def _devices(environ: Mapping[str, str]) -> dict:
    """Returns which of a machine's GPUs are a process's own, where JAX would get it wrong.

    In a step of Slurm JAX takes the GPU with the number of the task on its machine. If the task is the only one there it
    has all of them, and if Slurm shows it but one (`--gpus-per-task`) that is the one.
    """
    per_machine = environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", ""))
    alone = re.fullmatch(r"1(\(x\d+\))?", per_machine) is not None
    shown_one = environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    restricted = "SLURM_STEP_NODELIST" in environ and "JAX_LOCAL_DEVICE_IDS" not in environ
    return {"local_device_ids": []} if restricted and (alone or shown_one) else {}


def _several_tpu_hosts(environ: Mapping[str, str], metadata: Callable[[str], str]) -> bool:
    """Returns whether this is a host of a TPU slice that has others, or of one of several slices.

    Kubernetes Engine says so in the environment, TPU VMs in their metadata.
    """
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    slices = environ.get("MEGASCALE_NUM_SLICES", "")
    if not hosts and "TPU_SKIP_MDS_QUERY" not in environ:
        hosts = metadata("worker-network-endpoints")
        found = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", metadata("tpu-env") if hosts else "", re.MULTILINE)
        slices = slices or (found[1] if found else "")
    return "," in hosts or (hosts != "" and int(slices or 1) > 1)


def _metadata(name: str) -> str:
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.read().decode()
    except OSError:  # no such attribute, or no such server: not one of Google's machines
        return ""

"""What is settled before JAX touches a device."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from transformer.config import Config, ConfigError, replace
from transformer.parallel import startup
from transformer.parallel.processes import find_processes
from transformer.parallel.xla_flags import GPU, TPU, merged, set_flags

ROOT = Path(__file__).parent.parent.parent

FLAGS = replace(Config(), parallel={"coordinator": "a:1", "num_processes": 4, "process_id": 2})


KNOWN = {"cluster_detection_method": "deactivate"}


def arguments(address: str, count: int, index: int, **more: Any) -> dict[str, Any]:
    return {"coordinator_address": address, "num_processes": count, "process_id": index} | (more or KNOWN)


@pytest.mark.parametrize(
    ("config", "environ", "expected"),
    [
        pytest.param(Config(), {}, None, id="alone"),
        pytest.param(FLAGS, {}, arguments("a:1", 4, 2), id="flags"),
        pytest.param(
            Config(),
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"},
            arguments("b:2", 3, 1),
            id="environment",
        ),
        pytest.param(
            FLAGS,
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "1"},
            arguments("a:1", 4, 2),
            id="flags win",
        ),
        pytest.param(
            Config(),
            {"JAX_COORDINATOR_ADDRESS": "job-0.job:8080", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            arguments("job-0.job:8080", 2, 1),
            id="Kubernetes",
        ),
        pytest.param(Config(), {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}, {}, id="Slurm"),
        pytest.param(Config(), {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, None, id="Slurm, one task"),
        pytest.param(
            Config(),
            {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            {"local_device_ids": []},
            id="Slurm, one task a machine has all of its GPUs",
        ),
        pytest.param(
            Config(),
            {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
            | {"CUDA_VISIBLE_DEVICES": "3"},
            {"local_device_ids": []},
            id="Slurm, shown one GPU",
        ),
        pytest.param(
            Config(),
            {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
            | {"CUDA_VISIBLE_DEVICES": "0,1"},
            {},
            id="Slurm, a task a GPU",
        ),
        pytest.param(
            FLAGS,
            {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            arguments("a:1", 4, 2, local_device_ids=[]),
            id="flags in Slurm",
        ),
        # In a batch script, outside srun, there is no step.
        pytest.param(Config(), {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None, id="Slurm, no step"),
        pytest.param(Config(), {"TPU_WORKER_HOSTNAMES": "t0,t1"}, {}, id="TPU slice"),
        pytest.param(
            Config(),
            {"TPU_WORKER_HOSTNAMES": "t0,t1", "JAX_COORDINATOR_ADDRESS": "t0:1"},
            {},
            id="TPU slice with a coordinator of the user's",
        ),
        pytest.param(Config(), {"TPU_WORKER_HOSTNAMES": "localhost"}, None, id="one TPU host"),
        pytest.param(Config(), {"TPU_PROCESS_ADDRESSES": "t0:8471,t1:8471"}, {}, id="TPU slice by addresses"),
        pytest.param(
            Config(),
            {"TPU_WORKER_HOSTNAMES": "t0", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"},
            {},
            id="two TPU slices of one host",
        ),
    ],
)
def test_processes_are_found(config: Config, environ: dict[str, str], expected: dict[str, Any] | None) -> None:
    assert find_processes(config, environ) == expected


@pytest.mark.parametrize(
    ("said", "environ", "expected"),
    [
        ({}, {}, None),
        ({"worker-network-endpoints": "a:b:10.0.0.1"}, {}, None),
        ({"worker-network-endpoints": "a:b:10.0.0.1,a:c:10.0.0.2"}, {}, {}),
        ({"worker-network-endpoints": "a:b:10.0.0.1,a:c:10.0.0.2"}, {"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"worker-network-endpoints": "a:b:10.0.0.1", "tpu-env": "X: '1'\nMEGASCALE_NUM_SLICES: '2'"}, {}, {}),
    ],
)
def test_a_tpu_vm_is_asked_for_the_others(
    said: dict[str, str], environ: dict[str, str], expected: dict[str, Any] | None
) -> None:
    assert find_processes(Config(), environ, lambda name: said.get(name, "")) == expected


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "3"}, "JAX_PROCESS_ID"),
        ({"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES"),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "three", "JAX_PROCESS_ID": "0"},
            "JAX_NUM_PROCESSES = 'three'",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "JAX_PROCESS_ID = 2: must be below JAX_NUM_PROCESSES = 2",
        ),
    ],
)
def test_half_an_environment_is_a_mistake(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        find_processes(Config(), environ)


def test_flags_of_the_user_win() -> None:
    flags = {"one": "true", "two": "true"}
    assert merged(flags, "") == "--one=true --two=true"
    assert merged(flags, "--two=false --three=1") == "--one=true --two=false --three=1"
    assert merged(flags, "--two --one=0") == "--two --one=0"


@pytest.mark.parametrize(("accelerator", "variable"), [("gpu", "XLA_FLAGS"), ("tpu", "LIBTPU_INIT_ARGS")])
def test_each_accelerator_has_its_flags(accelerator: Any, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = {"gpu": "/dev/nvidia0", "tpu": "/dev/accel0"}[accelerator]
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == device)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    assert startup._accelerator() == accelerator
    environ = {variable: "--mine=1"}
    set_flags(accelerator, environ, "v5e")
    assert environ.keys() == {variable} and environ[variable].endswith(" --mine=1")
    assert len(environ[variable].split()) > 5
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert startup._accelerator() is None


def test_only_a_v5e_fuses_collectives() -> None:
    """libtpu refuses to compile for any other chip with these flags."""
    environ = {chip: {} for chip in ("v5e", "v5p", "v6e")}
    for chip, variables in environ.items():
        set_flags("tpu", variables, chip)
    fuses = {chip: "async_collective_fusion" in found["LIBTPU_INIT_ARGS"] for chip, found in environ.items()}
    assert fuses == {"v5e": True, "v5p": False, "v6e": False}


def test_this_release_knows_the_flags() -> None:
    """XLA ends a process over a flag that it does not know, and knows those of GPUs everywhere."""
    program = "import jax; print(jax.device_count())"
    flags = merged(GPU, "")
    assert printed(program, JAX_PLATFORMS="cpu", XLA_FLAGS=flags) == ["1"]
    with pytest.raises(subprocess.CalledProcessError):
        printed(program, JAX_PLATFORMS="cpu", XLA_FLAGS=f"{flags} --xla_gpu_no_such_flag=1")


def test_the_compiler_for_tpus_knows_its_flags() -> None:
    pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed")
    program = """
from jax.experimental import topologies
print(len(topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices))
"""
    environ = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    assert printed(program, **environ, LIBTPU_INIT_ARGS=merged(TPU, "")) == ["4"]
    with pytest.raises(subprocess.CalledProcessError):
        printed(program, **environ, LIBTPU_INIT_ARGS="--xla_tpu_no_such_flag=true")


def printed(program: str, **environ: str) -> list[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NPROC", "JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-c", program]
    return subprocess.check_output(command, text=True, cwd=ROOT, env=kept | environ).splitlines()


def test_devices_are_simulated_and_programs_kept(tmp_path: Path) -> None:
    program = f"""
import sys
from transformer.config import Config, replace
from transformer.parallel import startup
assert "jax" not in sys.modules
config = replace(Config(), parallel={{"cpu_devices": 3}}, compilation_cache_dir={str(tmp_path / "programs")!r})
startup.start(config)
startup.start(replace(config, parallel={{"cpu_devices": 5}}))
import os, jax, jax.numpy as jnp
print(jax.device_count(), jax.process_count(), jax.devices()[0].platform, os.environ["NPROC"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 2)(jnp.ones(3)).sum())
"""
    assert printed(program, XLA_FLAGS="--xla_cpu_enable_fast_math=false") == ["3 1 cpu 16", "6.0"]
    assert list((tmp_path / "programs").iterdir())


def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    program = """
from transformer.config import Config, replace
from transformer.parallel import startup
startup.start(replace(Config(), compilation_cache_dir=""))
import jax
print(jax.config.jax_compilation_cache_dir, jax.device_count())
"""
    assert printed(program, HOME=str(tmp_path), JAX_PLATFORMS="cpu") == ["None 1"]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="counts page faults of glibc")
def test_freed_memory_is_kept() -> None:
    # 64 MiB, thrice: only the first time do the pages come from the system.
    program = """
import ctypes, resource
from transformer.config import Config
from transformer.parallel import startup
startup.start(Config())
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = libc.malloc(2**26)
    ctypes.memset(memory, 1, 2**26)
    libc.free(memory)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    first, second, third = map(int, printed(program, JAX_PLATFORMS="cpu"))
    assert second + third < first / 10

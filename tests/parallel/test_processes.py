"""Two processes of four simulated devices each, through train.py, against one process of eight."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import SAMPLES, assert_losses_equal, free_port

from transformer.config import Config

Make = Callable[..., Config]
Start = Callable[..., subprocess.Popen[str]]
Lines = list[dict[str, Any]]

NUM_STEPS = 8


@pytest.fixture
def config(make_run: Make) -> Config:
    return make_run(
        data={"sequence_length": 32},
        model={"width": 32},
        train={"num_steps": NUM_STEPS, "batch_size": 16},
        parallel={"tensor": 2, "fsdp": 2, "replica": 2},
        checkpoint={"keep_latest": 10},
        evaluation=SAMPLES,
    )


def by_flags(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    flags = ["--parallel.coordinator", f"127.0.0.1:{port}", "--parallel.num-processes", "2"]
    return [*flags, "--parallel.process-id", str(index)], {}


def by_kubernetes(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    environ = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [], environ | {"JOB_COMPLETION_INDEX": str(index)}


def by_slurm(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    # The port is in the last twelve bits of the job's number.
    environ = {"SLURM_JOB_ID": str(port % 4096), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_STEP_NUM_NODES": "1"}
    return [], environ | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}


@pytest.fixture
def run_one(config: Config, start_training: Start) -> Callable[..., None]:
    """Runs one process of eight devices."""

    def run(workdir: Path, *flags: str) -> None:
        process = start_training(config, workdir, "--parallel.cpu-devices", "8", *flags)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output

    return run


@pytest.fixture
def run_two(config: Config, start_training: Start) -> Callable[..., list[str]]:
    """Runs two processes of four devices and returns what each wrote on the console."""

    def run(workdir: Path, how: Any, *flags: str, status: int = 0, before: tuple[str, str] = ("", "")) -> list[str]:
        port, processes = free_port(), []
        for index in range(2):
            own, environ = how(index, port)
            flags_of_all = ("--parallel.cpu-devices", "4", *flags)
            processes.append(start_training(config, workdir, *flags_of_all, *own, before=before[index], **environ))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [status] * 2, "\n\n".join(outputs)
        return outputs

    return run


SIGNALLED = """
import os, signal, transformer.training.loop as loop
settle = loop.Loop._settle
def signalled(self, pending):
    if pending and pending[0] == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return settle(self, pending)
loop.Loop._settle = signalled
"""


def test_two_processes_equal_one(
    run_one: Callable[..., None],
    run_two: Callable[..., list[str]],
    read_lines: Callable[[Path], Lines],
    read_state: Callable[..., dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_one(one)
    # A signal to one of two stops both at the same step, and they go on from there.
    first, second = run_two(two, by_kubernetes, status=143, before=("", SIGNALLED))
    last = read_lines(two)[-1]["step"]
    assert last in (3, 4, 5)
    assert int(read_state(two)["step"]) == last
    assert f"stopped by a signal after step {last}; saved" in first
    assert "step" not in second
    first, second = run_two(two, by_slurm)
    assert f"resuming after step {last} of {NUM_STEPS}" in first
    assert "step" not in second
    # Each line is written once, by one process.
    splits = {n: ("train", "validation")[: 2 - bool(n % 4)] for n in range(1, NUM_STEPS + 1)}
    assert [(line["step"], line["split"]) for line in read_lines(two)] == [(n, s) for n in splits for s in splits[n]]
    assert (two / "samples.jsonl").read_text().count("\n") == 2
    assert_losses_equal(read_lines(two), read_lines(one))


@pytest.mark.slow
def test_a_checkpoint_of_one_process_is_restored_in_two_and_that_of_two_in_one(
    run_one: Callable[..., None],
    run_two: Callable[..., list[str]],
    read_lines: Callable[[Path], Lines],
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_one(one)
    run_two(two, by_flags)
    for source, finish in ((one, lambda mixed: run_two(mixed, by_flags)), (two, run_one)):
        mixed = tmp_path / f"{source.name} mixed"
        shutil.copytree(source, mixed)
        for step in (path for path in (mixed / "checkpoints").iterdir() if path.name != "4"):
            shutil.rmtree(step)
        finish(mixed)
        assert read_lines(mixed)[:5] == read_lines(source)[:5]
        assert_losses_equal(read_lines(mixed), read_lines(one))


def test_a_mistake_ends_both_processes(run_two: Callable[..., list[str]], tmp_path: Path) -> None:
    outputs = run_two(tmp_path / "run", by_flags, "--train.batch-size", "6", status=2)
    for output in outputs:
        assert "error: train.batch_size / train.num_microbatches = 6 is not divisible by the 4" in output
        assert "Traceback" not in output

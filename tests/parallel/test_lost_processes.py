"""What becomes of a run when one of its processes dies, hangs, or holds something else than the others."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from running import assert_losses_equal, free_port

from transformer.checkpointing.places import locked
from transformer.config import Config, replace
from transformer.parallel import HUNG, LOST
from transformer.parallel.agreement import differences, facts_of
from transformer.parallel.supervisor import Place, explain
from transformer.parallel.watchdog import Watchdog
from transformer.training import loop

Make = Callable[..., Config]
Process = subprocess.Popen[str]
Run = Callable[..., list[Process]]
Lines = list[dict[str, Any]]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children die with their parents on Linux alone")

HEARTBEAT = 6
"""Seconds after which a process is lost. A loaded machine may leave a living one without a turn for seconds."""


@pytest.fixture
def start(start_training: Callable[..., Process]) -> Run:
    """Starts processes of as many devices each as told, of one run."""

    def start(
        config: Config | Sequence[Config], workdir: Path, count: int, devices: int = 1, before: Sequence[str] = ()
    ) -> list[Process]:
        address = f"127.0.0.1:{free_port()}"
        flags = ["--parallel.cpu-devices", str(devices), "--parallel.coordinator", address]
        flags += ["--parallel.num-processes", str(count)]
        configs = [config] * count if isinstance(config, Config) else config
        started = []
        for index, own in enumerate(configs):
            code = before[index] if before else ""
            started.append(start_training(own, workdir, *flags, "--parallel.process-id", str(index), before=code))
        return started

    return start


QUIET = {"every_steps": 0, "sample_tokens": 0, "num_batches": 1}
"""Validation costs compilations, and says nothing here."""


def ends(processes: Sequence[Process]) -> list[str]:
    """Waits for all and returns what each wrote."""
    return [process.communicate(timeout=200)[0] for process in processes]


def statuses(processes: Sequence[Process]) -> list[int | None]:
    return [process.returncode for process in processes]


def wait_for_step(processes: Sequence[Process], workdir: Path, step: int) -> None:
    metrics = workdir / "metrics.jsonl"
    pattern = re.compile(rb'"step": (\d+)')
    while not metrics.exists() or max([0, *map(int, pattern.findall(metrics.read_bytes()))]) < step:
        assert [process.poll() for process in processes] == [None] * len(processes), ends(processes)
        time.sleep(0.01)


def child_of(process: Process) -> int:
    [child, *_] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def lines_of(workdir: Path, read_lines: Callable[[Path], Lines]) -> Lines:
    return [line for line in read_lines(workdir) if line["split"] == "train"]


def test_two_processes_are_killed_and_hang_and_one_finishes(
    make_run: Make, start: Run, start_training: Callable[..., Process], tmp_path: Path, read_lines: Any
) -> None:
    config = make_run(
        train={"num_steps": 100_000},
        evaluation=QUIET,
        parallel={"heartbeat_seconds": HEARTBEAT},
    )
    workdir = tmp_path / "run"
    random_step = random.Random(0).randrange(5, 12)

    # The one that does not keep the store of keys is killed, and its child with it.
    processes = start(config, workdir, 2)
    wait_for_step(processes, workdir, random_step)
    child = child_of(processes[1])
    processes[1].kill()
    output, _ = ends(processes)
    assert statuses(processes) == [LOST, -signal.SIGKILL], output
    assert re.search(rf"error: process 1 of 2 \(.*\) is lost: no sign of life for {HEARTBEAT} s", output), output
    assert "Traceback" not in output and not is_running(child)

    # One stands still, that which keeps the store of keys, and the other waits for it in a collective.
    hanging = replace(config, parallel={"watchdog_seconds": 4, "heartbeat_seconds": 600})
    processes = start(hanging, workdir, 2)
    wait_for_step(processes, workdir, random_step + 10)
    os.kill(child_of(processes[0]), signal.SIGSTOP)
    output = processes[1].communicate(timeout=200)[0]
    assert processes[1].returncode == HUNG, output
    assert re.search(r"error: hung for 4 s .* after step \d+; the stacks of all threads", output), output
    stacks = (workdir / "hung.1.txt").read_text()
    assert re.search(r"after step \d+", stacks) and "in _settle" in stacks and "in run" in stacks
    assert "in _settle" in output
    processes[0].kill()
    ends(processes)

    # The one that does is killed.
    processes = start(config, workdir, 2)
    wait_for_step(processes, workdir, random_step + 20)
    processes[0].kill()
    _, output = ends(processes)
    assert statuses(processes) == [-signal.SIGKILL, LOST], output
    assert re.search(r"error: process 0 of 2 \(127.0.0.1:\d+\) is lost", output.splitlines()[-1]), output

    # One process goes on, and what came out is what one that was never disturbed finds.
    num_steps = lines_of(workdir, read_lines)[-1]["step"] // 4 * 4 + 4
    finished = replace(config, train={"num_steps": num_steps})
    process = start_training(finished, workdir)
    [output] = ends([process])
    assert process.returncode == 0 and "resuming after step" in output, output
    assert loop.run(replace(finished, parallel={"fsdp": 8}), tmp_path / "undisturbed") == 0
    assert_losses_equal(lines_of(workdir, read_lines), lines_of(tmp_path / "undisturbed", read_lines))


PREPARING_IS_SIGNALLED = """
import os, signal, transformer.training.loop as loop
prepare = loop.prepare_apart
def signalled(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return prepare(*arguments, **options)
loop.prepare_apart = signalled
"""


def test_a_signal_before_the_first_step_ends_all_alike(make_run: Make, start: Run, tmp_path: Path) -> None:
    processes = start(make_run(evaluation=QUIET), tmp_path / "run", 2, before=("", PREPARING_IS_SIGNALLED))
    outputs = ends(processes)
    assert statuses(processes) == [143, 143], outputs
    assert "process 1 of 2" in outputs[0] and "stopped by a signal before the first step" in outputs[0], outputs[0]
    assert "Traceback" not in "".join(outputs)


@pytest.mark.slow
def test_a_directory_in_use_ends_both(make_run: Make, start: Run, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with locked(workdir):
        processes = start(make_run(evaluation=QUIET), workdir, 2)
        outputs = ends(processes)
    assert statuses(processes) == [2, 2], outputs
    assert f"error: {workdir} is in use by another process that trains there" in outputs[0]
    assert re.search(r"error: process 0 of 2 \(.*\) ended: .* is in use by another process", outputs[1]), outputs[1]


@pytest.mark.slow
def test_a_full_disk_of_one_ends_both(make_run: Make, start: Run, tmp_path: Path) -> None:
    full = """
import errno, transformer.checkpointing.checkpoints as checkpoints, jax
save = checkpoints.Checkpoints.save
def failing(self, *arguments):
    if jax.process_index() == 0:
        raise OSError(errno.ENOSPC, "No space left on device", "runs")
    return save(self, *arguments)
checkpoints.Checkpoints.save = failing
"""
    processes = start(make_run(evaluation=QUIET), tmp_path / "run", 2, before=(full, full))
    outputs = ends(processes)
    assert statuses(processes) == [1, 1], outputs
    assert "error: [Errno 28] No space left on device: 'runs'" in outputs[0]
    assert re.search(r"error: process 0 of 2 \(.*\) ended: OSError: .*No space left on device", outputs[1]), outputs[1]


def test_processes_that_disagree_are_named(make_run: Make, start: Run, tmp_path: Path) -> None:
    config = make_run()
    other = replace(config, train={"batch_size": 16}, optimizer={"beta1": 0.8})
    processes = start([config, other], tmp_path / "run", 2)
    for output in ends(processes):
        assert "error: process 1: train.batch_size = 16, process 0 8\n" in output
        assert "error: process 1: optimizer.beta1 = 0.8, process 0 0.9\n" in output
        assert "Traceback" not in output and output.count("error:") == 2
    assert statuses(processes) == [2, 2]
    assert not (tmp_path / "run").exists()


def test_differences_name_processes_and_values() -> None:
    usual = {"train.batch_size": "16", "seed": "0"}
    assert differences([usual] * 5) == []
    assert differences([usual, usual, usual, usual | {"train.batch_size": "32"}]) == [
        "process 3: train.batch_size = 32, the others 16"
    ]
    assert differences([usual | {"seed": "1"}, usual, {"train.batch_size": "16"}, usual, usual]) == [
        "process 0: seed = 1, the others 0",
        "process 2: seed = absent, the others 0",
    ]
    assert differences([usual, usual | {"seed": "7"}]) == ["process 1: seed = 7, process 0 0"]
    many = [usual] * 20 + [usual | {"seed": "1"}] * 10
    assert differences(many)[0].startswith("processes 20, 21, 22, 23, 24, 25, 26, 27, 2 more: seed = 1, the others 0")


def test_who_a_process_is_may_differ() -> None:
    one = replace(Config(), parallel={"process_id": 0, "coordinator": "a:1"}, compilation_cache_dir="here")
    other = replace(Config(), parallel={"process_id": 1, "coordinator": "b:1"}, data={"cache_dir": "/scratch"})
    assert facts_of(one) == facts_of(other)
    assert {"train.batch_size", "the source of transformer", "the package jax"} <= facts_of(one).keys()


def test_the_end_of_a_child_is_explained() -> None:
    unreachable, killed = f"127.0.0.1:{free_port()}", signal.SIGKILL
    status, text = explain(signal.SIGABRT, Place(unreachable, 2, 4, joined=True))
    assert status == LOST and f"process 0 of 4 ({unreachable}) is lost" in text
    status, text = explain(signal.SIGABRT, Place(unreachable, 2, 4))
    assert status == LOST and "process 2 of 4: not all processes came to" in text
    assert explain(signal.SIGABRT, Place(unreachable, 0, 4, joined=True))[0] == 134
    assert explain(killed, Place(unreachable, 2, 4, joined=True)) == (
        137,
        "process 2 of 4 was ended by SIGKILL, as the system does where memory runs out",
    )
    assert explain(signal.SIGSEGV, Place()) == (139, "this process was ended by SIGSEGV")


def test_the_watchdog_waits_for_the_first_beat_and_barks_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    left: list[tuple[int, str]] = []
    watchdog = Watchdog(1, tmp_path, 3, lambda status, reason: left.append((status, reason)))
    time.sleep(1.5)
    assert not left
    watchdog.beat("validating after step 7", compiles=True)
    time.sleep(1.5)
    assert not left
    watchdog.beat("in a step after step 7")
    until = time.monotonic() + 30
    while not left and time.monotonic() < until:
        time.sleep(0.05)
    [(status, reason)] = left
    assert status == HUNG and "hung for 1 s in a step after step 7" in reason and "hung.3.txt" in reason
    assert f"in {test_the_watchdog_waits_for_the_first_beat_and_barks_once.__name__}" in capfd.readouterr().err
    assert "in a step after step 7" in (tmp_path / "hung.3.txt").read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_four_processes_lose_any_one_and_go_on_with_four_three_and_two(
    make_run: Make, start: Run, tmp_path: Path, read_lines: Any
) -> None:
    config = make_run(
        data={"sequence_length": 32},
        model={"width": 32, "num_layers": 2},
        # At a rate at which the loss falls steadily: where it jumps, it blows up the rounding of another order of sums.
        optimizer={"learning_rate": 1e-3},
        train={"num_steps": 100_000, "batch_size": 24},
        evaluation=QUIET | {"batch_size": 24},
        checkpoint={"every_steps": 5},
        parallel={"heartbeat_seconds": 20},
    )
    workdir = tmp_path / "run"
    generator = random.Random(1)
    step = 0
    for count, victim in ((4, 2), (4, 0), (3, 1), (2, 1)):
        resumes = step > 0
        processes = start(config, workdir, count, devices=2)
        step += generator.randrange(8, 30)
        wait_for_step(processes, workdir, step)
        begin = time.monotonic()
        processes[victim].kill()
        outputs = ends(processes)
        waited = time.monotonic() - begin
        print(f"{count} processes, {victim} killed at step {step}: ended after {waited:.1f} s")
        # What docs/pods.md promises.
        assert waited <= 1.25 * 20 + 15
        assert statuses(processes) == [-signal.SIGKILL if index == victim else LOST for index in range(count)], outputs
        assert ("resuming after step" in outputs[0]) == resumes
        for index, output in enumerate(outputs):
            assert index == victim or f"error: process {victim} of {count} (" in output.splitlines()[-1], output
    num_steps = lines_of(workdir, read_lines)[-1]["step"] + 3
    finished = replace(config, train={"num_steps": num_steps})
    outputs = ends(processes := start(finished, workdir, 3, devices=2))
    assert statuses(processes) == [0, 0, 0], outputs
    assert loop.run(replace(finished, parallel={"fsdp": 8}), tmp_path / "undisturbed") == 0
    found, expected = lines_of(workdir, read_lines), lines_of(tmp_path / "undisturbed", read_lines)
    worst = max(
        abs(one["loss"] - other["loss"]) / abs(other["loss"]) for one, other in zip(found, expected, strict=True)
    )
    print(f"{num_steps} steps: losses differ by {worst:.2e} relative at most")
    assert worst <= 1e-5 and [line["step"] for line in found] == [line["step"] for line in expected]

    # Where batch and mesh do not divide, the message says why.
    uneven = replace(finished, train={"batch_size": 16})
    outputs = ends(processes := start(uneven, tmp_path / "uneven", 3, devices=2))
    assert statuses(processes) == [2, 2, 2]
    assert all("train.batch_size / train.num_microbatches = 16 is not divisible by the 6" in text for text in outputs)


@pytest.mark.slow
def test_a_process_0_that_stands_still_is_lost(make_run: Make, start: Run, tmp_path: Path) -> None:
    config = make_run(train={"num_steps": 100_000}, evaluation=QUIET, parallel={"heartbeat_seconds": HEARTBEAT})
    processes = start(config, tmp_path / "run", 2)
    wait_for_step(processes, tmp_path / "run", 3)
    os.kill(child_of(processes[0]), signal.SIGSTOP)
    output = processes[1].communicate(timeout=200)[0]
    processes[0].kill()
    ends(processes)
    assert processes[1].returncode == LOST, output
    assert re.search(r"error: process 0 of 2 \(127.0.0.1:\d+\) is lost: no answer for \d+ s", output), output


@pytest.mark.slow
def test_four_processes_with_one_that_stands_still_leave_the_stacks_of_three(
    make_run: Make, start: Run, tmp_path: Path
) -> None:
    config = make_run(
        train={"num_steps": 100_000},
        evaluation=QUIET,
        parallel={"heartbeat_seconds": 600, "watchdog_seconds": 5},
    )
    workdir = tmp_path / "run"
    processes = start(config, workdir, 4, devices=2)
    wait_for_step(processes, workdir, 10)
    os.kill(child_of(processes[2]), signal.SIGSTOP)
    outputs = [process.communicate(timeout=200)[0] for process in processes if process is not processes[2]]
    processes[2].kill()
    ends(processes)
    assert statuses(processes) == [HUNG, HUNG, -signal.SIGKILL, HUNG], outputs
    assert all("in _settle" in output and "error:" in output.splitlines()[-1] for output in outputs), outputs
    assert {path.name for path in workdir.glob("hung.*")} == {"hung.0.txt", "hung.1.txt", "hung.3.txt"}

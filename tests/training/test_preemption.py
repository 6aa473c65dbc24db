"""Signals, to a real process: the exit status, what is saved, and leaving at once."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from transformer.config import Config
from transformer.training import loop
from transformer.training.preemption import Signals

Make = Callable[..., Config]
Start = Callable[..., subprocess.Popen[str]]

STATUS = [pytest.param(signal.SIGTERM, 143, id="SIGTERM"), pytest.param(signal.SIGINT, 130, id="SIGINT")]


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "status"), STATUS)
def test_a_signal_while_data_is_prepared(
    number: int, status: int, make_run: Make, start_training: Start, tmp_path: Path
) -> None:
    # Enough text that tokenising it takes longer than the signal.
    corpus = tmp_path / "large.jsonl"
    config = make_run()
    corpus.write_text((tmp_path / "corpus.jsonl").read_text() * 1000)
    process = start_training(config, tmp_path / "run", "--data.path", str(corpus))
    wait_for(process, (tmp_path / "cache" / "datasets").exists)
    process.send_signal(number)
    # Also proves that no process is left behind: all of them write to this stream.
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "Traceback" not in output
    assert not list((tmp_path / "cache").rglob("index.json"))


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        pytest.param("prepare_apart", signal.SIGTERM, 143, marks=pytest.mark.slow),
        ("make_optimizer", signal.SIGINT, 130),
        ("create_state", signal.SIGTERM, 143),
    ],
)
def test_a_signal_before_the_first_step_ends_the_run_with_its_status(
    moment: str, number: int, status: int, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(loop, moment)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, moment, interrupted)
        with pytest.raises(SystemExit) as caught:
            loop.run(make_run(), tmp_path / "run")
    assert caught.value.code == status
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert loop.run(make_run(train={"num_steps": 1}), tmp_path / "run") == 0


def test_a_signal_while_the_step_compiles(make_run: Make, start_training: Start, tmp_path: Path) -> None:
    before = """
import os, signal, transformer.training.loop as loop
make = loop.make_train_step
def interrupted(*arguments):
    step = make(*arguments)
    def traced(state, batch):
        os.kill(os.getpid(), signal.SIGINT)
        return step(state, batch)
    return traced
loop.make_train_step = interrupted
"""
    # Its own: a step that another test has kept is loaded and not traced.
    config = make_run(compilation_cache_dir=str(tmp_path / "programs"))
    process = start_training(config, tmp_path / "run", before=before)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    assert "Traceback" not in output and "step 1/" not in output


def test_a_signal_in_the_run_saves_and_the_same_command_finishes(
    make_run: Make,
    start_training: Start,
    tmp_path: Path,
    read_lines: Callable[[Path], list[dict[str, Any]]],
    read_state: Callable[..., Any],
) -> None:
    config, workdir = make_run(train={"num_steps": 100_000}, evaluation={"every_steps": 0}), tmp_path / "run"
    process = start_training(config, workdir)
    metrics = workdir / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    last = read_lines(workdir)[-1]["step"]
    assert f"stopped by a signal after step {last}; saved" in output and "Traceback" not in output
    assert int(read_state(workdir)["step"]) == last
    process = start_training(config, workdir, "--train.num-steps", str(last + 5))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert f"resuming after step {last} of {last + 5}" in output
    assert [line["step"] for line in read_lines(workdir) if line["split"] == "train"] == list(range(1, last + 6))


def test_a_second_signal_leaves_at_once_even_while_the_main_thread_waits(
    make_run: Make, start_training: Start, tmp_path: Path
) -> None:
    # A call that lets no signal handler of Python's run, as when waiting for a device, and that takes hours.
    before = """
import hashlib, pathlib, sys, transformer.training.loop as loop
def settle(self, pending):
    print("waiting", flush=True)
    pathlib.Path(sys.argv[-1]).touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
loop.Loop._settle = settle
"""
    flag = tmp_path / "waiting"
    process = start_training(make_run(), tmp_path / "run", "--evaluation.sample-prompt", str(flag), before=before)
    wait_for(process, flag.exists)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "Traceback" not in output


def test_a_signal_and_its_echo_are_one() -> None:
    """As `timeout` sends it: to the process, and then to its group."""
    with Signals() as signals:
        signals.defer()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.02)
        assert signals.received == signal.SIGTERM


def test_the_first_signal_is_noted_once_there_is_something_to_save() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)
    with Signals() as signals:
        signals.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    with Signals() as signals:
        assert signals.received == 0
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        assert caught.value.code == 130
    assert (signal.getsignal(signal.SIGTERM), signal.set_wakeup_fd(-1)) == before

"""SIGKILL at random moments, and the same command again: nothing that was promised is lost."""

import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import SAMPLES

from transformer.config import Config

Make = Callable[..., Config]
Start = Callable[..., subprocess.Popen[str]]

TEMPORARY = "*.orbax-checkpoint-tmp*"
OPTIMIZED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "false", "XLA_FLAGS": ""}
"""As users compile: that the same program gives the same bits is a claim about theirs."""


def last_step(workdir: Path) -> int:
    lines = (workdir / "metrics.jsonl").read_bytes().split(b"\n")[:-1] if (workdir / "metrics.jsonl").exists() else []
    return int(lines[-1].split(b",")[0].rpartition(b" ")[2]) if lines else 0


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool], delay: float) -> None:
    while process.poll() is None and not reached():
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("save", "step"), id="2"),
        pytest.param(("prepare", "prepare", "start", *("step", "save") * 3, "step"), id="10", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_ends_like_one_that_never_was(
    moments: tuple[str, ...],
    make_run: Make,
    start_training: Start,
    tmp_path: Path,
    assert_same_run: Callable[[Path, Path], None],
) -> None:
    def config(name: str) -> Config:
        return make_run(
            data={"cache_dir": str(tmp_path / f"cache {name}"), "num_workers": 0},
            model={"dropout": 0.1, "num_layers": 2},
            optimizer={"schedule": "cosine", "warmup_steps": 10},
            train={"num_steps": num_steps, "num_microbatches": 2},
            evaluation={"every_steps": 20, **SAMPLES},
            checkpoint={"every_steps": 5},
            tracking={"tensorboard": True},
            compilation_cache_dir=str(tmp_path / f"compiled {name}"),
        )

    num_steps = 32 + 16 * len(moments)
    begin = time.monotonic()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    generator = random.Random(len(moments))
    steps = iter(sorted(generator.sample(range(1, num_steps - 40), len(moments))))
    in_a_save = []
    for moment in moments:
        process = start_training(config("killed"), killed, **OPTIMIZED)
        step, delay = next(steps), generator.uniform(0, 0.05)
        checkpoints = killed / "checkpoints"
        if moment == "prepare":
            delay = generator.uniform(0, 1.5)
            kill_when(process, (tmp_path / "cache killed").exists, delay)
            assert not (killed / "metrics.jsonl").exists()
        elif moment == "start":
            kill_when(process, lambda: True, generator.uniform(0.5, 3))
        elif moment == "step":
            kill_when(process, lambda: last_step(killed) >= step, delay)  # noqa: B023
        else:
            kill_when(process, lambda: last_step(killed) >= step and any(checkpoints.glob(TEMPORARY)), 0)  # noqa: B023
            in_a_save.append(any(checkpoints.glob(TEMPORARY)))
        print(
            f"{time.monotonic() - begin:.1f} s: killed ({moment}) at step {last_step(killed)}, {sorted(p.name for p in checkpoints.glob('*'))}"
        )
    assert any(in_a_save)

    for name, workdir in (("killed", killed), ("whole", whole)):
        process = start_training(config(name), workdir, **OPTIMIZED)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        print(f"{time.monotonic() - begin:.1f} s: finished {name}")
    assert_same_run(killed, whole)
    assert not list((killed / "checkpoints").glob(TEMPORARY))
    shards = [sorted((tmp_path / f"cache {name}" / "tokens").rglob("*.array_record")) for name in ("killed", "whole")]
    assert [path.name for path in shards[0]] == [path.name for path in shards[1]] != []
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]

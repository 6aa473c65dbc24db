"""Fixtures of the tests that train: a run that takes seconds, processes of train.py, and what is left of a run."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.config import Config, replace, to_json

ROOT = Path(__file__).parent.parent
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
TIMES = ("step_seconds", "tokens_per_second")


def free_port() -> int:
    """Returns one of the last 4096 ports: under Slurm JAX takes one of these, and the system gives them to nobody."""
    for port in random.sample(range(2**16 - 4096, 2**16), 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def assert_losses_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Within 4 n units in the last place at step n, as float32 has them."""
    assert [(line["step"], line["split"]) for line in found] == [(line["step"], line["split"]) for line in expected]
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        unit = np.spacing(np.float32(other["loss"]))
        worst = max(worst, abs(one["loss"] - other["loss"]) / unit / one["step"])
        assert abs(one["loss"] - other["loss"]) <= 4 * one["step"] * unit, (one, other)
        assert one["tokens"] == other["tokens"]
    print(f"at most {worst:.2f} n ulp at step n")


SAMPLES = {"sample_tokens": 2}
"""For `evaluation`, of runs whose samples are looked at: each program that draws them takes a second to trace."""


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from changes, as of `config.replace`, to a configuration with a corpus of its own."""
    return runs_in(tmp_path)


def runs_in(directory: Path) -> Callable[..., Config]:
    """Returns what `make_run` is, for a directory that may outlive a test."""
    generator = random.Random(0)
    corpus = directory / "corpus.jsonl"
    texts = [" ".join(generator.choices(WORDS, k=generator.randrange(5, 60))) for _ in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def make(**changes: Any) -> Config:
        tiny = {
            "data": {
                "path": (str(corpus),),
                "validation_documents": 0.1,
                "tokenizer": "bytes",
                "sequence_length": 16,
                "cache_dir": str(directory / "cache"),
                "num_workers": 1,
            },
            "model": {"num_layers": 1, "width": 16, "num_heads": 2},
            "optimizer": {"schedule": "constant", "learning_rate": 1e-2},
            "train": {"num_steps": 12, "batch_size": 8},
            "evaluation": {"every_steps": 4, "batch_size": 16, "sample_tokens": 0},
            "checkpoint": {"every_steps": 4},
            "tracking": {"plot": False, "tensorboard": False},
            "compilation_cache_dir": str(ROOT / ".pytest_cache" / "processes"),
        }
        for section, change in changes.items():
            tiny[section] = tiny[section] | change if isinstance(change, dict) and section in tiny else change
        return replace(Config(), **tiny)

    return make


@pytest.fixture
def start_training(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Returns a function that starts train.py in a process with one device; its output is one stream.

    `before` is Python that runs first in that process, to break something in it.
    """
    started: list[subprocess.Popen[str]] = []

    def start(config: Config, workdir: Path, *flags: str, before: str = "", **environ: str) -> subprocess.Popen[str]:
        recipe = tmp_path / f"recipe_{len(started)}.json"
        recipe.write_text(to_json(config))
        program = f"{before}\nimport sys, train\nsys.exit(train.exit_status(train.main, sys.argv[1:]))"
        arguments = ["--config", str(recipe), "--workdir", str(workdir), *flags]
        process = subprocess.Popen(
            [sys.executable, *(["-c", program] if before else [str(ROOT / "train.py")]), *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture
def read_state() -> Callable[..., dict[str, np.ndarray]]:
    """Returns a function from a run directory to the arrays of its latest checkpoint, or of another, by name."""
    from transformer.checkpointing.checkpoints import Checkpoints
    from transformer.checkpointing.run import CHECKPOINTS, for_platform, load_run
    from transformer.models.parameters import parameter_specs
    from transformer.models.transformer import Transformer
    from transformer.optimizers import make_optimizer
    from transformer.parallel.sharding import make_mesh
    from transformer.training.loop import restore
    from transformer.training.state import abstract_state, state_shardings

    def read(workdir: Path, step: int | None = None) -> dict[str, np.ndarray]:
        config = replace(load_run(workdir).config, parallel={"replica": 1, "fsdp": 1, "tensor": 1})
        model = Transformer(for_platform(config.model, "cpu"))
        optimizer = make_optimizer(config, parameter_specs(model))
        shardings = state_shardings(model, optimizer, make_mesh(config, jax.devices()[:1]))
        with Checkpoints(workdir / CHECKPOINTS) as checkpoints:
            chosen = checkpoints.latest_step() if step is None else step
            assert chosen is not None
            state = restore(checkpoints, chosen, abstract_state(model, optimizer, shardings))
        leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
        return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

    return read


@pytest.fixture
def read_lines() -> Callable[[Path], list[dict[str, Any]]]:
    """Returns a function from a run directory to the lines of its metrics.jsonl, without what clocks say."""

    def read(workdir: Path) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in record.items() if name not in TIMES} for record in records]

    return read


@pytest.fixture
def assert_same_run(
    read_state: Callable[..., dict[str, np.ndarray]], read_lines: Callable[[Path], list[dict[str, Any]]]
) -> Callable[[Path, Path], None]:
    """Returns a function that asserts that two runs ended bit-equal: parameters, optimizer state, metrics, and samples
    if either has some."""

    def samples(workdir: Path) -> str | None:
        return (workdir / "samples.jsonl").read_text() if (workdir / "samples.jsonl").exists() else None

    def check(one: Path, other: Path) -> None:
        assert read_lines(one) == read_lines(other)
        assert samples(one) == samples(other)
        left, right = read_state(one), read_state(other)
        assert left.keys() == right.keys()
        assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []

    return check


@pytest.fixture
def signal_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Returns a function that has this process sent a signal when the line of a step is written."""
    from transformer.training.report import Report

    train = Report.train

    def arrange(step: int, number: int) -> None:
        def with_signal(self: Report, record: dict[str, Any], mfu: float | None) -> None:
            train(self, record, mfu)
            if record["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Report, "train", with_signal)

    return arrange

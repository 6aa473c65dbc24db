"""Compiled steps that are kept: when they serve, and that they are the same steps."""

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from transformer.benchmarks.measure import own_process
from transformer.checkpointing import programs
from transformer.config import Config, replace
from transformer.training import loop
from transformer.training.step import compile_step

MESH = Mesh(np.array(jax.devices()[:1]), ("only",))
STATE, BATCH = {"w": jnp.arange(4.0)}, {"x": jnp.ones(4)}


class Compiler:
    """Compiles a small step and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Any:
        self.times += 1

        def step(state: Any, batch: Any) -> Any:
            return {"w": state["w"] + batch["x"]}, {"b": jnp.sum(state["w"]), "a": jnp.max(batch["x"])}

        return jax.jit(step, donate_argnums=0).lower(STATE, BATCH).compile()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, int]]:
    """Returns a function that starts a run, and returns its program and how often that was compiled for it."""
    # The suite's own cache would serve some of these programs.
    monkeypatch.setattr(programs, "_hits", Never())

    def begin(**changes: Any) -> tuple[Any, int]:
        compiler = Compiler()
        config = replace(Config(), **{"compilation_cache_dir": str(tmp_path / "cache"), **changes})
        return programs.stored_program(config, MESH, (STATE, BATCH), compiler), compiler.times

    return begin


class Never(list[str]):
    def __len__(self) -> int:
        return 0


def test_a_second_start_reads_what_the_first_wrote(start: Any) -> None:
    for times in (1, 0, 0):
        program, found = start()
        assert found == times
        state, metrics = program(jax.tree.map(jnp.copy, STATE), BATCH)
        assert state["w"].tolist() == [1, 2, 3, 4] and metrics == {"a": 1, "b": 6}
        assert program.memory_analysis() is not None
    # What a step does not depend on.
    assert start(data={"path": ("other.txt",)}, evaluation={"every_steps": 7})[1] == 0


@pytest.mark.parametrize("change", ["rate", "length", "code", "flags", "processor"])
def test_what_the_program_depends_on_makes_another(change: str, start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    start()
    changes: dict[str, Any] = {
        "rate": {"optimizer": {"learning_rate": 1e-5}},
        "length": {"data": {"sequence_length": 17}},
    }.get(change, {})
    if change == "code":
        monkeypatch.setattr(programs, "code_hash", lambda: "other")
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    elif change == "processor":
        monkeypatch.setattr(programs, "_processor", lambda: ["flags: none"])
    assert start(**changes)[1] == 1


@pytest.mark.parametrize("damage", ["cut short", "a byte", "empty", "not ours"])
def test_a_damaged_file_is_compiled_anew(
    damage: str, start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start()
    (path,) = (tmp_path / "cache" / "steps").iterdir()
    content = path.read_bytes()
    changed = {"cut short": content[: len(content) // 2], "a byte": content[:-1] + b"!", "not ours": b"text\n" * 3}
    path.write_bytes(changed.get(damage, b""))
    program, times = start()
    assert times == 1 and "not loaded, so compiled: " in capsys.readouterr().err
    assert program(jax.tree.map(jnp.copy, STATE), BATCH)[1] == {"a": 1, "b": 6}
    assert start()[1] == 0, "the file was not written anew"


def test_a_cache_that_cannot_be_written_to_is_no_mistake(start: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    assert start()[1] == 1


def test_without_a_cache_nothing_is_written(start: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert start(compilation_cache_dir="")[1] == 1
    assert not list(tmp_path.iterdir())


def test_what_comes_from_the_cache_of_xla_is_not_kept(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it lacks the code of its kernels, which shows only when it runs."""
    found: list[str] = []
    monkeypatch.setattr(programs, "_hits", found)
    compiled = Compiler.__call__
    monkeypatch.setattr(Compiler, "__call__", lambda self: (found.append("hit"), compiled(self))[1])
    for _ in range(2):
        assert start()[1] == 1


@pytest.mark.slow
def test_hits_of_the_cache_are_seen(tmp_path: Path) -> None:
    program = f"""
import jax, jax.numpy as jnp
from transformer.benchmarks.measure import own_process
from transformer.checkpointing import programs
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((4, 4))).compile()
print(len(programs._hits))
"""
    command, environment = own_process(program)
    found = [int(subprocess.check_output(command, env=environment, text=True)) for _ in range(2)]
    assert found[0] == 0 and found[1] > 0


def uncached(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function with JAX's cache of programs off."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        return function(*args)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


def test_a_run_that_goes_on_does_not_compile_its_step(
    make_run: Callable[..., Config],
    signal_after: Callable[[int, int], None],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(programs, "_hits", Never())
    # A cache of its own, and no program in it that was not compiled for it.
    monkeypatch.setattr(loop, "compile_step", lambda *args: uncached(compile_step, *args))
    config = make_run(train={"num_steps": 6}, compilation_cache_dir=str(tmp_path / "programs"))
    assert loop.run(config, tmp_path / "whole") == 0
    signal_after(3, signal.SIGTERM)
    assert loop.run(config, tmp_path / "resumed") == 143
    capsys.readouterr()

    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(loop, "compile_step", never)
    assert loop.run(config, tmp_path / "resumed") == 0
    told = capsys.readouterr().out
    assert "loaded in " in told
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")

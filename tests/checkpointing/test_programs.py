"""The compiled step that lies in a run directory: who may read it, when it serves, and that it is the same step."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from transformer.checkpointing import programs
from transformer.config import Config, replace
from transformer.training import loop

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
def start(tmp_path: Path) -> Callable[..., tuple[Any, int]]:
    """Returns a function that starts a run, and returns its program and how often that was compiled for it."""
    config = replace(Config(), compilation_cache_dir=str(tmp_path / "cache"))

    def begin(config: Config = config) -> tuple[Any, int]:
        compiler = Compiler()
        return programs.stored_program(config, tmp_path / "run", (STATE, BATCH), STATE, compiler), compiler.times

    (tmp_path / "run").mkdir()
    return begin


def test_a_second_start_reads_what_the_first_wrote(start: Any, tmp_path: Path) -> None:
    for times in (1, 0, 0):
        program, found = start()
        assert found == times
        state, metrics = program(jax.tree.map(jnp.copy, STATE), BATCH)
        assert state["w"].tolist() == [1, 2, 3, 4] and metrics == {"a": 1, "b": 6}
        assert program.memory_analysis() is not None
    assert (tmp_path / "cache" / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("change", ["a byte", "half a file", "nothing", "another secret"])
def test_what_another_has_written_is_not_read(change: str, start: Any, tmp_path: Path) -> None:
    start()
    (path,) = (tmp_path / "run").iterdir()
    content = path.read_bytes()
    if change == "another secret":
        (tmp_path / "cache" / "secret").write_bytes(b"x" * 32)
    else:
        path.write_bytes({"a byte": content[:-1] + b"!", "half a file": content[: len(content) // 2]}.get(change, b""))
    assert start()[1] == 1
    assert start()[1] == 0, "the file was not written anew"


@pytest.mark.parametrize("change", ["configuration", "code", "flags", "processor"])
def test_what_the_program_depends_on_makes_another(
    change: str, start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    config = replace(Config(), compilation_cache_dir=str(tmp_path / "cache"))
    if change == "configuration":
        config = replace(config, optimizer={"learning_rate": 1e-5})
    elif change == "code":
        monkeypatch.setattr(programs, "_code", lambda: "other")
    elif change == "flags":
        monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    else:
        monkeypatch.setattr(programs, "_processor", lambda: ["flags: none"])
    assert start(config)[1] == 1


def test_without_a_cache_nothing_is_written(start: Any, tmp_path: Path) -> None:
    for _ in range(2):
        assert start(replace(Config(), compilation_cache_dir=""))[1] == 1
    assert not list((tmp_path / "run").iterdir())


def test_a_run_that_goes_on_does_not_compile_its_step(
    make_run: Callable[..., Config],
    signal_after: Callable[[int, int], None],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_run()
    assert loop.run(config, tmp_path / "whole") == 0
    signal_after(5, signal.SIGTERM)
    assert loop.run(config, tmp_path / "resumed") == 143
    capsys.readouterr()

    def never(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(loop, "compile_step", never)
    assert loop.run(config, tmp_path / "resumed") == 0
    told = capsys.readouterr().out
    assert "loaded in " in told and "traced 0 time(s)" in told
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")

"""The loop, from text to a finished run, in this process on a mesh of eight devices."""

import json
import os
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from running import SAMPLES
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import load_run
from transformer.config import Config, from_json
from transformer.data.prepare import prepare
from transformer.data.tokenizers import load_tokenizer
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.evaluation import Evaluator
from transformer.training.report import Report

Make = Callable[..., Config]

TRAIN_FIELDS = "step split loss cross_entropy tokens gradient_norm learning_rate step_seconds tokens_per_second".split()


def events(directory: Path) -> Iterator[Event]:
    for file in sorted(directory.iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            yield Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]


def steps_of(workdir: Path) -> list[int]:
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.steps()


def test_a_run_leaves_everything_that_the_other_verbs_need(
    make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(evaluation=SAMPLES, tracking={"plot": True, "tensorboard": True})
    workdir = tmp_path / "run"
    assert loop.run(config, workdir) == 0

    saved = from_json((workdir / "config.json").read_text())
    assert (saved.model.vocab_size, saved.model.num_positions) == (260, 16)
    assert load_tokenizer(workdir / "tokenizer").fingerprint == load_run(workdir).tokenizer.fingerprint

    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    expected = [
        (step, split) for step in range(1, 13) for split in (("train",) if step % 4 else ("train", "validation"))
    ]
    assert [(record["step"], record["split"]) for record in records] == expected
    for record in records:
        if record["split"] == "train":
            assert list(record)[:3] == ["step", "split", "loss"]
            assert set(record) == set(TRAIN_FIELDS)
            assert record["learning_rate"] == pytest.approx(1e-2)
            assert 0 < record["tokens"] <= 8 * 16
            assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        else:
            assert {"loss", "cross_entropy", "tokens", "accuracy", "bits_per_byte"} <= set(record)
    losses = [record["loss"] for record in records if record["split"] == "train"]
    assert losses[0] == pytest.approx(np.log(260), abs=0.1)
    assert losses[-1] < losses[0] - 0.5

    samples = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [4, 8, 12]
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    tagged = {
        (value.tag, event.step): value.simple_value
        for event in events(workdir / "tensorboard")
        for value in event.summary.value
    }
    for record in records:
        assert tagged[f"{record['split']}/loss", record["step"]] == pytest.approx(record["loss"])

    # Latest two, and the best.
    assert steps_of(workdir) == [8, 12]
    assert capsys.readouterr().out.endswith(f"finished: {workdir} holds the run\n")


def test_a_finished_run_started_again_does_nothing(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = make_run(train={"num_steps": 4}, evaluation=SAMPLES), tmp_path / "run"
    assert loop.run(config, workdir) == 0
    kept = [workdir / "metrics.jsonl", workdir / "samples.jsonl", *(workdir / "checkpoints").rglob("*")]
    before = {path: path.stat().st_mtime_ns for path in kept}

    def never(*_: Any) -> Any:
        raise AssertionError("a finished run compiles no step")

    monkeypatch.setattr(loop.Loop, "_compile", never)
    assert loop.run(config, workdir) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_run_that_averages_evaluates_its_average_and_resumes_without(
    make_run: Make,
    tmp_path: Path,
    signal_after: Callable[[int, int], None],
    assert_same_run: Callable[[Path, Path], None],
    read_state: Callable[[Path], dict[str, np.ndarray]],
    read_lines: Callable[[Path], list[dict[str, Any]]],
) -> None:
    config = make_run(
        train={"num_steps": 4},
        optimizer={"name": "schedule_free", "schedule": "constant", "learning_rate": 1e-2},
        evaluation=SAMPLES,
    )
    assert loop.run(config, tmp_path / "whole") == 0
    signal_after(2, signal.SIGTERM)
    workdir = tmp_path / "resumed"
    assert loop.run(config, workdir) == 143
    assert loop.run(config, workdir) == 0
    assert_same_run(workdir, tmp_path / "whole")

    run, trained = load_run(workdir), read_state(workdir)
    mesh = make_mesh(run.config)
    with jax.set_mesh(mesh):
        model, params, _ = load_parameters(run, mesh)
        prepared = prepare(run.config, False)
        loss = Evaluator(run.config, prepared, model, mesh)(params)["loss"]
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(params))
    found = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    assert all(not np.array_equal(leaf, trained[f"params.{name}"]) for name, leaf in found.items())
    assert loss == pytest.approx(read_lines(workdir)[-1]["loss"], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_run_that_was_signalled_ends_like_one_that_never_was(
    tensor: int,
    make_run: Make,
    tmp_path: Path,
    signal_after: Callable[[int, int], None],
    assert_same_run: Callable[[Path, Path], None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
) -> None:
    # Dropout, a batch that grows, a schedule and an average: all that could depend on how often the run was started.
    config = make_run(
        model={"dropout": 0.1},
        optimizer={"schedule": "cosine", "warmup_steps": 4, "ema_decay": 0.8},
        train={"num_microbatches": 2, "batch_size": 16, "batch_warmup_steps": 9},
        parallel={"tensor": tensor},
        evaluation=SAMPLES,
    )
    assert loop.run(config, tmp_path / "whole") == 0
    workdir = tmp_path / "interrupted"
    for step, number, status in ((2, signal.SIGTERM, 143), (7, signal.SIGINT, 130), (10, signal.SIGTERM, 143)):
        signal_after(step, number)
        assert loop.run(config, workdir) == status
        # At most the step that the device was busy with is finished, and whatever was computed is saved.
        assert steps_of(workdir)[-1] == read_lines(workdir)[-1]["step"]
        assert steps_of(workdir)[-1] in (step, step + 1)
    assert loop.run(config, workdir) == 0
    assert_same_run(workdir, tmp_path / "whole")


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("at the step", marks=pytest.mark.slow),
        pytest.param("in the validation", marks=pytest.mark.slow),
        pytest.param("killed after it", marks=pytest.mark.slow),
    ],
)
def test_a_signal_does_not_wait_for_a_validation_that_is_due(
    moment: str,
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_after: Callable[[int, int], None],
    assert_same_run: Callable[[Path, Path], None],
    read_lines: Callable[[Path], list[dict[str, Any]]],
) -> None:
    config = make_run(evaluation={"every_steps": 5, "batch_size": 8, **SAMPLES}, checkpoint={"every_steps": 10})
    assert loop.run(config, tmp_path / "whole") == 0
    workdir = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        if moment == "at the step":
            # Step 5 is under way while the line of step 4 is written.
            signal_after(4, signal.SIGTERM)
        else:
            batches = Evaluator.batches

            def signalled(self: Evaluator) -> Iterator[dict[str, Any]]:
                for number, batch in enumerate(batches(self)):
                    if number == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield batch

            patch.setattr(Evaluator, "batches", signalled)
        assert loop.run(config, workdir) == 143
    assert steps_of(workdir)[-1] == 5
    assert [line["step"] for line in read_lines(workdir) if line["split"] == "validation"] == []
    if moment == "killed after it":
        # It validates step 5 again, and dies before the next checkpoint.
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(loop.Loop, "_settle", lambda self, pending: 1 // 0 if pending else 0)
            loop.run(config, workdir)
        assert [line["step"] for line in read_lines(workdir) if line["split"] == "validation"] == [5]
    assert loop.run(config, workdir) == 0
    assert_same_run(workdir, tmp_path / "whole")
    # The checkpoint that the signal saved has got its loss, so the same one is the best.
    with Checkpoints(workdir / "checkpoints") as ours, Checkpoints(tmp_path / "whole" / "checkpoints") as whole:
        assert ours.is_validated(ours.steps()[-1]) and ours.best_step() == whole.best_step()


def test_the_handlers_of_the_caller_are_back_after_a_run(make_run: Make, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert loop.run(make_run(train={"num_steps": 1}), tmp_path / "run") == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def broken_batches(monkeypatch: pytest.MonkeyPatch, broken: range) -> None:
    """Gives the steps in `broken` a batch whose weights are infinite."""
    train_batches = loop.train_batches

    def batches(config: Config, prepared: Any, start_step: int, rows: Any) -> Iterator[dict[str, np.ndarray]]:
        for step, batch in enumerate(train_batches(config, prepared, start_step, rows), start=start_step + 1):
            scale = np.float32(np.inf if step in broken else 1)
            yield batch | {"weights": np.where(batch["weights"] > 0, scale, np.float32(0))}

    monkeypatch.setattr(loop, "train_batches", batches)


def test_a_step_that_is_not_finite_is_skipped_and_counted(
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_state: Callable[..., dict[str, np.ndarray]],
) -> None:
    broken_batches(monkeypatch, range(3, 5))
    config = make_run(checkpoint={"every_steps": 1, "keep_latest": 20}, train={"num_steps": 6})
    assert loop.run(config, tmp_path / "run") == 0
    states = {step: read_state(tmp_path / "run", step) for step in range(1, 7)}
    assert [int(states[step]["nonfinite_steps"]) for step in range(1, 7)] == [0, 0, 1, 2, 0, 0]
    for name in states[2]:
        if name not in ("step", "nonfinite_steps"):
            assert np.array_equal(states[2][name], states[4][name]), name
    assert all(not np.array_equal(states[4][name], states[5][name]) for name in states[4] if "params" in name)
    assert all(np.isfinite(value).all() for value in states[6].values())
    assert "step 4: the gradient is not finite; skipped (2 in a row)" in capsys.readouterr().out


def test_too_many_steps_that_are_not_finite_end_the_run(
    make_run: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    read_lines: Callable[[Path], list[dict[str, Any]]],
) -> None:
    broken_batches(monkeypatch, range(5, 100))
    config = make_run(train={"num_steps": 50, "max_nonfinite_steps": 3}, evaluation={"every_steps": 0})
    assert loop.run(config, tmp_path / "run") == 3
    output = capsys.readouterr().out
    assert "stopping: 3 steps in a row" in output
    assert "signal" not in output
    lines = read_lines(tmp_path / "run")
    assert [line["loss"] is None for line in lines] == [False] * 4 + [True] * (len(lines) - 4)
    assert 7 <= len(lines) <= 8


def test_the_step_is_traced_once_and_nothing_compiles_after_the_first_validation(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal_after: Callable[[int, int], None]
) -> None:
    traces: list[int] = []
    make_train_step = loop.make_train_step

    def counted(*arguments: Any) -> Any:
        step = make_train_step(*arguments)

        def train_step(state: Any, batch: Any) -> Any:
            traces.append(1)
            return step(state, batch)

        return train_step

    monkeypatch.setattr(loop, "make_train_step", counted)
    compiled: list[str] = []
    watching = False

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if watching and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    pause = loop.Loop._pause

    def watched(self: loop.Loop, step: int, state: Any, status: int) -> int:
        nonlocal watching
        status = pause(self, step, state, status)
        watching = True
        return status

    monkeypatch.setattr(loop.Loop, "_pause", watched)
    config = make_run(train={"num_steps": 16}, compilation_cache_dir="")  # a step that was kept is not traced
    signal_after(9, signal.SIGTERM)
    assert loop.run(config, tmp_path / "run") == 143
    assert (len(traces), compiled) == (1, [])
    watching = False
    assert loop.run(config, tmp_path / "run") == 0
    watching = False
    assert (len(traces), compiled) == (2, [])


@pytest.mark.parametrize(
    "where", ["between steps", "in the batch", pytest.param("in validation", marks=pytest.mark.slow)]
)
def test_an_implicit_transfer_in_the_loop_is_an_error(
    where: str, make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where == "between steps":
        train = Report.train

        def careless(self: Report, record: dict[str, Any], mfu: float | None) -> None:
            train(self, record, mfu)
            jnp.multiply(jnp.ones(3), np.arange(3.0))

        monkeypatch.setattr(Report, "train", careless)
    elif where == "in the batch":
        monkeypatch.setattr(loop, "global_array", lambda mesh, rows, size, local: local)
    else:
        monkeypatch.setattr("transformer.training.evaluation.global_array", lambda mesh, rows, size, local: local)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(make_run(), tmp_path / "run")


def traces_in(workdir: Path) -> list[Path]:
    return sorted(workdir.glob("profile/**/*.xplane.pb"))


def test_a_profile_is_written(make_run: Make, tmp_path: Path) -> None:
    assert loop.run(make_run(profile={"start_step": 3, "num_steps": 2}), tmp_path / "run") == 0
    (trace,) = traces_in(tmp_path / "run")
    assert b"train" in trace.read_bytes()


@pytest.mark.slow
def test_a_profile_survives_the_end_of_a_run_and_a_resume_within_it(
    make_run: Make, tmp_path: Path, signal_after: Callable[[int, int], None]
) -> None:
    config = make_run(profile={"start_step": 3, "num_steps": 100})
    signal_after(4, signal.SIGTERM)
    assert loop.run(config, tmp_path / "run") == 143
    assert len(traces_in(tmp_path / "run")) == 1
    assert loop.run(config, tmp_path / "run") == 0
    assert len(traces_in(tmp_path / "run")) == 2


def test_a_run_tells_what_of_it_is_frozen(make_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"optimizer": {"frozen": ("embedding",)}, "train": {"num_steps": 1}}
    assert loop.run(make_run(**changes), tmp_path / "run") == 0
    found = re.search(r"([\d,]+) of ([\d,]+) parameters are trained \(", capsys.readouterr().out)
    assert found
    trained, total = (int(number.replace(",", "")) for number in found.groups())
    assert total - trained == 260 * 16, "bytes and special tokens, by the width"

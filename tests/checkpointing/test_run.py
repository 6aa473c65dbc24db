"""The run directory: who may train in it, what contradicts it, and a disk that fails."""

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import runs_in

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.fixed import contradictions
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.places import locked
from transformer.checkpointing.run import Run, for_platform, load_run
from transformer.config import CheckpointConfig, Config, ConfigError, from_json, replace, to_json
from transformer.config.absolute import absolute
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.models.parameters import map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import make_mesh
from transformer.training import loop

Make = Callable[..., Config]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    directory = tmp_path_factory.mktemp("trained")
    config = runs_in(directory)(train={"num_steps": 8}, checkpoint={"keep_latest": 1, "keep_best": 1})
    assert loop.run(config, directory / "run") == 0
    return config, directory / "run"


@pytest.fixture
def finished(trained: tuple[Config, Path], tmp_path: Path) -> tuple[Config, Path]:
    """A copy of a finished run, which a test may go on with."""
    config, workdir = trained
    return config, Path(shutil.copytree(workdir, tmp_path / "run"))


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_every_key_that_contradicts_a_run_is_named(finished: tuple[Config, Path]) -> None:
    config, workdir = finished
    before = everything(workdir)
    other = replace(
        config,
        model={"width": 32, "biases": True},
        train={"batch_size": 16},
        data={"sequence_length": 8, "tokenizer": "characters"},
        optimizer={"name": "sgd"},
        seed=1,
    )
    with pytest.raises(ConfigError) as caught:
        loop.run(other, workdir)
    problems = "\n".join(caught.value.problems)
    for named in (
        "model.width = 32 contradicts the run, which has 16",
        "model.biases = True contradicts",
        "train.batch_size = 16 contradicts the run, which has 8",
        "data.sequence_length = 8",
        "data.tokenizer",
        "optimizer.name = 'sgd'",
        "seed = 1",
    ):
        assert named in problems
    assert everything(workdir) == before


def test_another_corpus_contradicts_a_run(finished: tuple[Config, Path], tmp_path: Path) -> None:
    config, workdir = finished
    corpus = tmp_path / "corpus.jsonl"
    moved = replace(config, data={"path": (str(corpus),)})
    shutil.copy(config.data.path[0], corpus)
    assert loop.run(moved, workdir) == 0
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ConfigError, match="another corpus"):
        loop.run(moved, workdir)


def test_what_may_change_does(finished: tuple[Config, Path]) -> None:
    config, workdir = finished
    changed = replace(
        config,
        model={"remat": "full", "dropout": 0.1, "scan_layers": True},
        train={"num_steps": 12, "num_microbatches": 2, "batch_size": 8},
        parallel={"fsdp": 4, "tensor": 2},
        optimizer={"learning_rate": 1e-3},
    )
    assert loop.run(changed, workdir) == 0
    assert load_run(workdir).config.model.remat == "full"


@pytest.mark.slow
def test_clipping_may_be_switched_off_and_on(finished: tuple[Config, Path]) -> None:
    config, workdir = finished
    for steps, norm in ((10, 0.0), (12, 0.5)):
        assert loop.run(replace(config, optimizer={"clip_norm": norm}, train={"num_steps": steps}), workdir) == 0


def test_a_run_keeps_no_decision_of_the_hardware_and_names_files_from_anywhere(
    make_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_run(data={"path": ("corpus.jsonl",)}, train={"num_steps": 1}, model={"scan_layers": None})
    assert loop.run(config, tmp_path / "run") == 0
    kept = load_run(tmp_path / "run").config
    assert (kept.model.scan_layers, kept.model.attention_implementation) == (None, "auto")
    assert kept.data.path == (str(tmp_path / "corpus.jsonl"),)
    monkeypatch.chdir("/")
    assert loop.run(replace(kept, train={"num_steps": 2}), tmp_path / "run") == 0
    (tmp_path / "odd [1]").mkdir()
    monkeypatch.chdir(tmp_path / "odd [1]")
    assert Path(absolute(replace(config, data={"path": ("*.txt",)}).data)["path"][0]).parent.name == "odd [[]1]"
    monkeypatch.chdir("/")
    sources = ("local_text:a.txt", "local_text:/b/*.md", "python_stdlib", "hf:c")
    assert absolute(replace(config, data={"source": sources}).data)["source"] == ("local_text:/a.txt", *sources[1:])


def test_training_overwrites_no_directory_that_is_not_a_run(make_run: Make, tmp_path: Path) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    log.parent.mkdir()
    log.write_text("not ours\n")
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.json, but metrics\.jsonl"):
        loop.run(make_run(), log.parent)
    assert log.read_text() == "not ours\n"


def test_a_contradiction_is_two_lines_and_exit_status_2(finished: tuple[Config, Path], start_training: Start) -> None:
    config, workdir = finished
    output, _ = (process := start_training(config, workdir, "--model.width", "32", "--seed", "1")).communicate(
        timeout=300
    )
    assert process.returncode == 2
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "directory of another run" in errors[0]
    assert "model.width = 32" in errors[1] and "seed = 1" in errors[2]
    assert "Traceback" not in output and "compiled" not in output


def test_a_directory_that_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a run directory: it has no config\.json"):
        load_run(tmp_path)
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_run(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not a run directory"):
        load_run(tmp_path / "file")


def test_two_trainings_in_one_directory(make_run: Make, start_training: Start, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with locked(workdir):
        with pytest.raises(ConfigError, match="in use by another process"):
            loop.run(make_run(), workdir)
        process = start_training(make_run(), workdir)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 2
        assert "error: " in output and "in use by another process" in output
        assert "Traceback" not in output and "compiled" not in output
    assert not (workdir / "config.json").exists()
    assert loop.run(make_run(train={"num_steps": 1}), workdir) == 0


def test_parameters_of_a_run(
    finished: tuple[Config, Path], tmp_path: Path, read_state: Callable[..., dict[str, np.ndarray]]
) -> None:
    config, workdir = finished
    run = load_run(workdir)
    # Trained in this directory or moved: nothing but the directory is needed.
    moved = tmp_path / "moved"
    shutil.copytree(workdir, moved)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        _, params, step = load_parameters(load_run(moved), mesh)
        assert step == 8
        leaves = {
            jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        stored = read_state(workdir)
        assert all(np.array_equal(stored[f"params.{name}"], leaf) for name, leaf in leaves.items())
        assert load_parameters(run, mesh, best=True)[2] == 8
        with pytest.raises(ConfigError, match="has no checkpoint of step 3; there are: 8"):
            load_parameters(run, mesh, step=3)
        shutil.rmtree(moved / "checkpoints")
        with pytest.raises(ConfigError, match="no checkpoint yet"):
            load_parameters(load_run(moved), mesh)


def test_parameters_may_be_the_mean_of_the_last_checkpoints(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config()
    mesh = make_mesh(config, jax.devices()[:1])
    specs = parameter_specs(Transformer(for_platform(config.model, "cpu")))
    rng = np.random.default_rng(0)
    trees = {step: map_specs(lambda spec: rng.standard_normal(spec.shape, np.float32), specs) for step in (2, 5, 9)}
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig(keep_latest=3)) as checkpoints:
        for step, tree in trees.items():
            checkpoints.save(step, jax.tree.map(jnp.asarray, tree), {"step": jnp.int32(step)})
    run = Run(tmp_path, config, ByteTokenizer(), "")

    def assert_mean(steps: list[int], **options: Any) -> None:
        _, params, step = load_parameters(run, mesh, **options)
        assert step == steps[-1]
        mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0, dtype=np.float64), *(trees[at] for at in steps))
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6), params, mean
        )

    assert_mean([9])
    assert_mean([5, 9], average=2)
    assert_mean([2, 5, 9], average=3)
    assert_mean([2, 5], average=2, step=5)
    wrong: Any = (
        ({"average": 4}, "4 checkpoints cannot be averaged: .* has 3 checkpoints up to step 9; checkpoint.keep_latest"),
        ({"average": 2, "step": 2}, "has 1 checkpoint up to step 2"),
        ({"average": 0}, "0 checkpoints cannot be averaged"),
    )
    for options, sentence in wrong:
        with pytest.raises(ConfigError, match=sentence):
            load_parameters(run, mesh, **options)


def test_what_an_average_or_a_growing_batch_fixes() -> None:
    plain = replace(Config(), train={"num_microbatches": 2}, optimizer={"schedule": "constant"})
    changed = replace(plain, train={"num_microbatches": 4}, optimizer={"beta1": 0.8})
    assert contradictions(plain, changed) == []
    growing, schedule_free = {"train": {"batch_warmup_steps": 9}}, {"optimizer": {"name": "schedule_free"}}
    [problem] = contradictions(replace(plain, **growing), replace(changed, **growing))
    assert problem.startswith("train.num_microbatches = 4 contradicts")
    [problem] = contradictions(replace(plain, **schedule_free), replace(changed, **schedule_free))
    assert problem.startswith("optimizer.beta1 = 0.8 contradicts")
    [problem] = contradictions(plain, replace(plain, **growing))
    assert problem.startswith("train.batch_warmup_steps = 9 contradicts")


def test_a_config_is_read_back_as_it_was_written(make_run: Make) -> None:
    config = make_run(data={"weights": (1.0,)})
    assert from_json(to_json(config)) == config
    assert dataclasses.asdict(from_json(to_json(config))) == dataclasses.asdict(config)


DISK = """
mount -t tmpfs -o size=$SIZE none "$DISK" || exit 77
mkdir "$DISK/small"
"$PYTHON" train.py --config "$RECIPE" --workdir "$DISK/run" > "$OUT/full.txt" 2>&1; echo $? >> "$OUT/status"
ls "$DISK/run/checkpoints" > "$OUT/kept.txt"
mount -o remount,size=64m "$DISK"
"$PYTHON" train.py --config "$RECIPE" --workdir "$DISK/run" > "$OUT/larger.txt" 2>&1; echo $? >> "$OUT/status"
mount -o remount,ro "$DISK"
"$PYTHON" train.py --config "$RECIPE" --workdir "$DISK/run" > "$OUT/readonly.txt" 2>&1; echo $? >> "$OUT/status"
cp -r "$DISK/run" "$OUT/run"
mount -t tmpfs -o size=20k none "$DISK/small"
"$PYTHON" train.py --config "$RECIPE" --workdir "$OUT/unprepared" --data.cache-dir "$DISK/small" > "$OUT/cache.txt" 2>&1
echo $? >> "$OUT/status"
"""


@pytest.mark.slow
def test_a_disk_that_is_full_or_read_only(
    make_run: Make, tmp_path: Path, assert_same_run: Callable[[Path, Path], None], start_training: Start
) -> None:
    config = make_run(train={"num_steps": 40}, checkpoint={"keep_latest": 50}, evaluation={"every_steps": 8})
    (tmp_path / "recipe.json").write_text(to_json(config))
    (tmp_path / "disk").mkdir()
    root = Path(__file__).parent.parent.parent
    places: dict[str, Any] = {"DISK": tmp_path / "disk", "OUT": tmp_path, "RECIPE": tmp_path / "recipe.json"}
    environment = {name: str(path) for name, path in places.items()}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", DISK]
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount a small disk")
    done = subprocess.run(command, cwd=root, env={**os.environ, **environment, "PYTHON": sys.executable, "SIZE": "2m"})
    if done.returncode:
        pytest.skip("this machine does not let us mount a small disk")

    assert (tmp_path / "status").read_text().split() == ["1", "0", "1", "1"]
    complaints = (
        ("full", "No space left for a checkpoint", "disk/run"),
        ("readonly", "Read-only file system", "disk/run"),
        ("cache", "No space left on device", "disk/small"),
    )
    for name, complaint, where in complaints:
        output = (tmp_path / f"{name}.txt").read_text()
        assert "Traceback" not in output
        (error,) = [line for line in output.splitlines() if "rror" in line]
        assert error.startswith("error: ") and complaint in error and where in error
    assert "orbax-checkpoint-tmp" not in (tmp_path / "kept.txt").read_text()
    kept = [int(name) for name in (tmp_path / "kept.txt").read_text().split() if name.isdigit()]
    assert 4 in kept
    assert f"resuming after step {max(kept)} of 40" in (tmp_path / "larger.txt").read_text()

    process = start_training(config, tmp_path / "whole")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_names_its_files_of_pairs_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("source_path", "target_path", "validation_source_path", "validation_target_path")
    kept = absolute(replace(Config(), data={key: (key, f"/{key}") for key in keys}).data)
    assert {key: kept[key] for key in keys} == {key: (str(tmp_path / key), f"/{key}") for key in keys}

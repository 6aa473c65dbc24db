"""Checkpoints: whole or absent, kept as long as promised, and the same on every mesh."""

import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from transformer.checkpointing.checkpoints import Checkpoints, _disk_errors
from transformer.config import CheckpointConfig, Config, ConfigError
from transformer.models.parameters import parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.loop import _rest, restore
from transformer.training.state import TrainState, abstract_state, create_state, state_shardings


def small(value: float = 0) -> dict[str, Any]:
    return {"w": jnp.full((4, 2), value, jnp.float32), "b": jnp.full((2,), value, jnp.float32)}


def save(checkpoints: Checkpoints, step: int, loss: float | None = None) -> None:
    checkpoints.save(step, small(step), {"step": jnp.int32(step)}, loss)
    checkpoints.wait()


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_steps_that_reuse_the_memory_of_a_state_do_not_change_its_save(tmp_path: Path) -> None:
    mesh = jax.make_mesh((8,), ("fsdp",), (jax.sharding.AxisType.Auto,))
    layout = NamedSharding(mesh, PartitionSpec("fsdp"))

    @jax.jit(out_shardings=layout)
    def begin() -> list[jax.Array]:
        return [jax.random.normal(jax.random.key(n), (1024, 1024)) for n in range(8)]

    @jax.jit(donate_argnums=0)
    def following(state: list[jax.Array]) -> list[jax.Array]:
        return [x * 0.5 + 1 for x in state]

    expected = jax.device_get(begin())
    for attempt in range(3):
        state = second = begin()
        with Checkpoints(tmp_path / str(attempt), CheckpointConfig()) as checkpoints:
            checkpoints.save(1, {"x": state}, {"y": jnp.zeros(())})
            for _ in range(20):
                second, state = state, following(state)
            jax.block_until_ready(state)
            # The steps do reuse memory. (On CPU a save reads it in place, and until it is done that memory is not given.)
            assert all(x.is_deleted() for x in second)
            checkpoints.wait()
            found = checkpoints.restore(1, params={"x": state})["params"]["x"]
        for x, y in zip(found, expected, strict=True):
            assert np.asarray(x).tobytes() == y.tobytes()


def test_the_latest_the_best_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    losses = {1: 5.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: None, 6: 2.0, 7: None, 8: 7.0, 9: 8.0, 10: None}
    config = CheckpointConfig(keep_latest=2, keep_best=1, keep_every_steps=4)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step, loss in losses.items():
            save(checkpoints, step, loss)
            assert checkpoints.latest_step() == step
        assert checkpoints.steps() == [3, 4, 8, 9, 10]
        assert checkpoints.best_step() == 3
    assert names(tmp_path) == {"3", "4", "8", "9", "10"}
    # What an earlier process saved is judged alike.
    with Checkpoints(tmp_path, config) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (10, 3)
        save(checkpoints, 11, 0.5)
        assert checkpoints.steps() == [4, 8, 10, 11]
        assert checkpoints.best_step() == 11
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=0)) as checkpoints:
        save(checkpoints, 12)
    assert names(tmp_path) == {"12"}


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=1, keep_best=1)) as checkpoints:
        for step, loss in ((1, 2.0), (2, float("nan")), (3, float("inf")), (4, 3.0)):
            save(checkpoints, step, loss)
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 4], 1)


def test_a_loss_that_comes_later_counts(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_latest=1, keep_best=1)
    with Checkpoints(tmp_path, config) as checkpoints:
        save(checkpoints, 1, 3.0)
        save(checkpoints, 2)
        assert not checkpoints.is_validated(2)
        checkpoints.add_loss(2, 1.0)
        assert checkpoints.is_validated(2)
        save(checkpoints, 3, 2.0)
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3], 2)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 2
        assert checkpoints.restore(2, params=small())["params"]["b"].tolist() == [2, 2]


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        save(checkpoints, 3)
        checkpoints.save(3, small(9), {"step": jnp.int32(9)})
        checkpoints.wait()
        assert checkpoints.restore(3, params=small())["params"]["b"].tolist() == [3, 3]


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        save(checkpoints, 1)
        wanted = {
            "w": jax.ShapeDtypeStruct((4, 3), jnp.float32),
            "b": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
            "c": jax.ShapeDtypeStruct((), jnp.float32),
        }
        with pytest.raises(ConfigError) as caught:
            checkpoints.restore(1, params=wanted, rest={})
    assert caught.value.problems == (
        "checkpoint 1: params/c is not in the checkpoint",
        "checkpoint 1: params/b is ((2,), 'float32') in the checkpoint and ((2,), 'bfloat16') in the model",
        "checkpoint 1: params/w is ((4, 2), 'float32') in the checkpoint and ((4, 3), 'float32') in the model",
        "checkpoint 1: rest/step is in the checkpoint but not in the model",
    )


def test_half_written_checkpoints_are_ignored_and_cleaned_up(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=5)) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
    half = tmp_path / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "2", half)
    next(path for path in half.rglob("*") if path.is_file()).unlink()
    with Checkpoints(tmp_path) as reader:
        assert (reader.steps(), reader.latest_step()) == ([1, 2], 2)
    assert half.exists()
    with Checkpoints(tmp_path, CheckpointConfig(keep_latest=5)) as checkpoints:
        assert checkpoints.latest_step() == 2
        save(checkpoints, 4)
        assert names(tmp_path) == {"1", "2", "4"}
        save(checkpoints, 3)
        assert checkpoints.restore(3, params=small())["params"]["b"].tolist() == [3, 3]


@pytest.mark.parametrize("left", [(), ("params",), ("_CHECKPOINT_METADATA",), ("metrics", "rest")])
def test_a_checkpoint_whose_deletion_was_cut_short_harms_no_other(left: tuple[str, ...], tmp_path: Path) -> None:
    config = CheckpointConfig(keep_latest=2, keep_best=2)
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, 10.0 - step)
    shutil.copytree(tmp_path / "2", tmp_path / "1")
    for name in names(tmp_path / "1") - set(left):
        path = tmp_path / "1" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with Checkpoints(tmp_path) as reader:
        assert (reader.latest_step(), reader.best_step()) == (3, 3)
        assert reader.restore(3, params=small())["params"]["b"].tolist() == [3, 3]
    with Checkpoints(tmp_path, config) as checkpoints:
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (3, 3)
        save(checkpoints, 4, 6.0)
        save(checkpoints, 5, 5.0)
    assert names(tmp_path) == {"4", "5"}


def test_reading_changes_nothing(tmp_path: Path) -> None:
    with Checkpoints(tmp_path / "missing") as reader:
        assert (reader.steps(), reader.latest_step(), reader.best_step()) == ([], None, None)
    assert not (tmp_path / "missing").exists()


def test_a_checkpoint_for_which_there_is_no_space_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        save(checkpoints, 1)
        free = shutil.disk_usage(tmp_path)._replace(free=2**20 + 43)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
        with pytest.raises(OSError, match="No space left for a checkpoint of 1,048,620 bytes") as caught:
            save(checkpoints, 2)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
        assert names(tmp_path) == {"1"}
        monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=2**20 + 44))
        save(checkpoints, 2)
        assert checkpoints.steps() == [1, 2]


def test_an_error_of_the_disk_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, _disk_errors(tmp_path):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing ...: No space left on device [os_error_code='28']")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ValueError, match=r"^something else$"), _disk_errors(tmp_path):
        raise ValueError("something else")


Layout = dict[str, int]


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        ({"fsdp": 1}, {"fsdp": 8}),
        pytest.param({"fsdp": 8}, {"tensor": 2, "fsdp": 4}, marks=pytest.mark.slow),
        ({"replica": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 1}),
    ],
)
def test_a_state_is_the_same_on_another_mesh(
    saved: Layout, restored: Layout, make_run: Callable[..., Config], tmp_path: Path
) -> None:
    def parts(layout: Layout) -> tuple[Config, Any, Any, TrainState]:
        config = make_run(parallel=layout, model={"vocab_size": 260, "num_positions": 16, "scan_layers": False})
        model = Transformer(config.model)
        optimizer = make_optimizer(config, parameter_specs(model))
        mesh = make_mesh(config, jax.devices()[: math.prod(layout.values())])
        return config, model, optimizer, state_shardings(model, optimizer, mesh)

    config, model, optimizer, shardings = parts(saved)
    state = create_state(config, model, optimizer, shardings)
    # Moments that are not zero.
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x + jnp.asarray(3, x.dtype), tree), out_shardings=shardings)
    state = scramble(state)
    _, model, optimizer, others = parts(restored)
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state.params, _rest(state))
        checkpoints.wait()
        found = restore(checkpoints, 1, abstract_state(model, optimizer, others))
    pairs = list(zip(jax.tree.leaves(state), jax.tree.leaves(found), jax.tree.leaves(others), strict=True))
    for old, new, layout in pairs:
        assert new.sharding.is_equivalent_to(layout, new.ndim)
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert any(new.sharding.device_set != old.sharding.device_set for old, new, _ in pairs) or saved != restored
    if restored != {"fsdp": 1}:
        assert any(not new.sharding.is_fully_replicated for _, new, _ in pairs)

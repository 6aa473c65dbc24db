"""The state of every optimizer over eight devices: where its arrays lie, that steps do not depend on it, and that it
comes back from a checkpoint bit by bit."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.config import CheckpointConfig, ConfigError
from transformer.models.parameters import map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh, sharding
from transformer.training.loop import _rest, restore
from transformer.training.state import TrainState, abstract_state, state_shardings
from transformer.training.step import make_train_step

SPLIT = {"replica": 2, "fsdp": 2, "tensor": 2}

CASES = {
    "adamw": {},
    "average": {"ema_decay": 0.5},
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "sgd": {"name": "sgd", "momentum": 0.9},
    "muon": {"name": "muon"},
    "schedule_free": {"name": "schedule_free", "schedule": "constant"},
}


def numbers(specs: Any, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: 0.1 * rng.standard_normal(spec.shape, np.float32), specs)


def build(make: Any, case: str, parallel: dict[str, int]) -> tuple[Any, Any, Any, Any]:
    # Wide enough for Adafactor to keep rows and columns.
    model = {"width": 128, "num_heads": 4, "feedforward_width": 256, "norm": "none"}
    config = make(model=model, optimizer=CASES[case], parallel=parallel)
    module = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(module))
    mesh = make_mesh(config, jax.devices()[: math.prod(parallel.values())])
    return mesh, module, optimizer, state_shardings(module, optimizer, mesh)


def begin(module: Any, optimizer: Any, shardings: Any) -> TrainState:
    params = jax.device_put(numbers(parameter_specs(module), 0), shardings.params)
    # A copy, for what is donated must not be elsewhere too.
    opt_state = jax.device_put(jax.tree.map(np.array, optimizer.init(params)), shardings.opt_state)
    zeros = (jax.device_put(np.zeros((), np.int32), shardings.step) for _ in range(2))
    return TrainState(next(zeros), params, opt_state, next(zeros))


def two_steps(mesh: Any, module: Any, optimizer: Any, shardings: Any) -> TrainState:
    def step(state: TrainState, gradients: Any) -> TrainState:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params, rate=jnp.float32(1e-2))
        params: Any = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, opt_state, state.nonfinite_steps)

    layouts = (shardings, shardings.params)
    with jax.set_mesh(mesh):
        step = jax.jit(step, in_shardings=layouts, out_shardings=shardings, donate_argnums=0)
        state = begin(module, optimizer, shardings)
        for seed in (1, 2):
            state = step(state, jax.device_put(numbers(parameter_specs(module), seed), shardings.params))
    return state


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case in ("adamw", "muon", "schedule_free") else pytest.mark.slow)
        for case in CASES
    ],
)
def test_steps_are_those_of_one_device_and_come_back_from_a_checkpoint(
    case: str, tiny_config: Any, tmp_path: Path
) -> None:
    parts = build(tiny_config, case, SPLIT)
    mesh, module, optimizer, shardings = parts
    state = two_steps(*parts)
    one = build(tiny_config, case, {"replica": 1, "fsdp": 1, "tensor": 1})
    alone = two_steps(*one)
    for (path, found), wanted in zip(
        jax.tree_util.tree_leaves_with_path((state, state.evaluated())),
        jax.tree.leaves((alone, alone.evaluated())),
        strict=True,
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-6, err_msg=jax.tree_util.keystr(path))

    # Every array as large as a parameter lies where it does, the average too.
    specs = [
        (jax.tree_util.keystr(path), spec)
        for path, spec in jax.tree_util.tree_leaves_with_path(parameter_specs(module))
    ]
    for path, leaf in jax.tree_util.tree_leaves_with_path((state, state.evaluated())):
        if leaf.size > 2**12:
            [spec] = [spec for name, spec in specs if jax.tree_util.keystr(path).endswith(name)]
            layout = sharding(mesh, spec.axes, spec.shape)
            assert leaf.sharding.is_equivalent_to(layout, leaf.ndim) and not leaf.sharding.is_fully_replicated

    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(2, state.evaluated(), _rest(state))
        checkpoints.wait()
        back = restore(checkpoints, 2, abstract_state(one[1], one[2], one[3]))
        kept = checkpoints.restore(2, params=abstract_state(module, optimizer, shardings).params)["params"]
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    for old, new in zip(jax.tree.leaves(state.evaluated()), jax.tree.leaves(kept), strict=True):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    assert ("params" in _rest(state)) == (case in ("average", "schedule_free"))
    moved = jax.tree.map(lambda one, other: bool(np.any(one != other)), state.params, state.evaluated())
    assert any(jax.tree.leaves(moved)) == (case in ("average", "schedule_free"))


def test_rows_and_columns_lie_along_their_dimension(tiny_config: Any) -> None:
    _, _, _, shardings = build(tiny_config, "adafactor", SPLIT)
    rows, columns = (optax.tree_utils.tree_get(shardings.opt_state, name) for name in ("v_row", "v_col"))
    # Of [L, embed, heads] and [L, heads, embed], both dimensions 128 long, and of [vocab, embed], 256 and 128.
    for path, row, column in (
        (("query", "kernel"), ("fsdp",), ("tensor",)),
        (("output", "kernel"), ("tensor",), ("fsdp",)),
    ):
        for found, axis in ((rows, row), (columns, column)):
            mixer = found["decoder"]["layers"]["mixer"]
            assert mixer[path[0]][path[1]].spec == PartitionSpec(None, *axis)
    assert rows["embedding"].spec == PartitionSpec("fsdp") and columns["embedding"].spec == PartitionSpec("tensor")
    whole = optax.tree_utils.tree_get(shardings.opt_state, "v")
    assert whole["embedding"].spec == PartitionSpec()


def test_an_average_is_asked_for_by_the_configuration(tiny_config: Any, tmp_path: Path) -> None:
    """A checkpoint without one does not pass for one with it."""
    _, module, optimizer, shardings = build(tiny_config, "adamw", {"replica": 1, "fsdp": 1, "tensor": 1})
    state = begin(module, optimizer, shardings)
    _, *other = build(tiny_config, "average", {"replica": 1, "fsdp": 1, "tensor": 1})
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state.evaluated(), _rest(state))
        checkpoints.wait()
        with pytest.raises(ConfigError, match=r"rest/params/decoder.* is not in the checkpoint"):
            restore(checkpoints, 1, abstract_state(*other))


def test_a_step_with_an_average_and_a_batch_that_grows_over_eight_devices(tiny_config: Any, tiny_batch: Any) -> None:
    """The whole step, twice: with one microbatch of two and with both."""
    found = []
    for parallel in (SPLIT, {"replica": 1, "fsdp": 1, "tensor": 1}):
        config = tiny_config(
            optimizer={"name": "sgd", "ema_decay": 0.5, "learning_rate": 0.1},
            train={"num_microbatches": 2, "batch_warmup_steps": 1},
            model={"num_layers": 1, "norm": "none"},
            parallel=parallel,
        )
        mesh = make_mesh(config, jax.devices()[: math.prod(parallel.values())])
        module = Transformer(config.model)
        optimizer = make_optimizer(config, parameter_specs(module))
        shardings = state_shardings(module, optimizer, mesh)
        step = jax.jit(
            make_train_step(config, module, optimizer, shardings),
            out_shardings=(shardings, None),
            donate_argnums=0,
        )
        losses = []
        with jax.set_mesh(mesh):
            state = begin(module, optimizer, shardings)
            for seed in range(3):
                batch = tiny_batch(config, seed)
                if seed == 0:
                    batch = {name: np.where(np.arange(8)[:, None] % 2, 0, values) for name, values in batch.items()}
                state, metrics = step(state, batch)
                losses.append(metrics["loss"].item())
        found.append((losses, jax.device_get(state.evaluated()["embedding"])))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)

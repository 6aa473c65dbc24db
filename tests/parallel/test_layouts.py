"""Every layout of eight simulated devices computes what one device does.

Two programs a layout: 20 steps of AdamW, whose losses are compared, and 20 of plain SGD, whose first gradient and last
parameters are (Adam turns rounding noise in gradients of zero into whole steps). Equal means ||a - b|| <= 1e-5 ||b||.
"""

import functools
import re
from typing import Any

import jax
import numpy as np
import optax
import pytest

from transformer.config import Config
from transformer.models import causal_blocks
from transformer.models.parameters import init_parameters, is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import batch_sharding, make_mesh, replicated, sharding
from transformer.training.state import TrainState, abstract_state, create_state, initial_state, state_shardings
from transformer.training.step import make_train_step

NUM_STEPS = 20
SPLITS = [(r, f, 8 // (r * f)) for r in (1, 2, 4, 8) for f in (1, 2, 4, 8) if r * f <= 8]

SCANNED = {
    "num_heads": 8,
    "head_width": 4,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "tied_embeddings": False,
    "scan_layers": True,
    "remat": "full",
}
MODELS = {
    # Six heads divide neither by 4 nor by 8, and 203 tokens by nothing.
    "uneven": {
        "model": {
            "width": 48,
            "num_heads": 6,
            "num_kv_heads": 2,
            "positions": "learned",
            "biases": True,
            "attention_implementation": "causal_blocks",
        }
    },
    "scanned": {"model": SCANNED, "objective": {"z_loss": 1e-3}},
    "microbatches": {"model": SCANNED, "train": {"num_microbatches": 2}},
    "dropout": {"model": SCANNED | {"dropout": 0.1}},
    "recurrent": {"model": {"layers": "lstm/none", "recurrent_width": 48, "positions": "none", "scan_layers": True}},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in rows of 16 tokens, the last of them short."""
    monkeypatch.setattr(causal_blocks, "SMALLEST", 5)
    monkeypatch.setattr(causal_blocks, "MOST", 99)


OPTIMIZERS = {
    "adamw": {"learning_rate": 3e-3, "warmup_steps": 5},
    # So small a momentum changes no bit of the parameters, and leaves the gradient of the first step in the state.
    "sgd": {"name": "sgd", "learning_rate": 0.3, "clip_norm": 0.0, "momentum": 1e-30, "schedule": "constant"},
}


def train(config: Config, batches: list[Any], devices: Any) -> dict[str, Any]:
    """Returns the losses of 20 steps, compiled and laid out as in the loop, and the state after the first and the last."""
    mesh = make_mesh(config, devices)
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    shardings = state_shardings(model, optimizer, mesh)
    rows = batch_sharding(mesh)
    step = jax.jit(
        make_train_step(config, model, optimizer, shardings),
        in_shardings=(shardings, dict.fromkeys(batches[0], rows)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},  # LLVM's, which take most of the time
    )
    # The default generator takes the compiler seconds; `create_state` has a test of its own.
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    zero = np.zeros((), np.int32)
    state = jax.device_put(TrainState(zero, params, optimizer.init(params), zero), shardings)
    losses, first = [], None
    with jax.set_mesh(mesh):
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, rows))
            losses.append(metrics["loss"].item())
            first = first or jax.device_get(state)
    return {"losses": losses, "first": first, "last": state}


@pytest.fixture(scope="module")
def run(tiny_config, tiny_batch):
    """Trains a model with an optimizer on a split of the devices, and on one, of which the result is kept."""

    @functools.cache
    def trained(model: str, optimizer: str, replica: int, fsdp: int, tensor: int) -> dict[str, Any]:
        parallel = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
        config = tiny_config(**MODELS[model], optimizer=OPTIMIZERS[optimizer], parallel=parallel)
        batches = [tiny_batch(config, seed) for seed in range(NUM_STEPS)]
        return train(config, batches, jax.devices()[: replica * fsdp * tensor])

    return trained


def assert_equal(actual: Any, expected: Any) -> None:
    actual, expected = jax.device_get((actual, expected))
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        distance, norm = np.linalg.norm(one - other), np.linalg.norm(other)
        # The gradient of a bias of all keys is zero: without rotation it adds the same to all scores of a query.
        if "['key']['bias']" in jax.tree_util.keystr(path):
            assert distance < 1e-6 and norm < 1e-6
        else:
            assert norm > 0 and distance <= 1e-5 * norm, jax.tree_util.keystr(path)


def same(run: Any, model: str, split: tuple[int, int, int]) -> None:
    adamw, adamw_alone = run(model, "adamw", *split), run(model, "adamw", 1, 1, 1)
    np.testing.assert_allclose(adamw["losses"], adamw_alone["losses"], rtol=1e-5)
    sgd, sgd_alone = run(model, "sgd", *split), run(model, "sgd", 1, 1, 1)
    np.testing.assert_allclose(sgd["losses"], sgd_alone["losses"], rtol=1e-5)
    gradient = optax.tree_utils.tree_get(sgd["first"].opt_state, "trace")
    assert_equal(gradient, optax.tree_utils.tree_get(sgd_alone["first"].opt_state, "trace"))
    assert_equal(sgd["last"].params, sgd_alone["last"].params)


def name_of(split: tuple[int, int, int]) -> str:
    return "replica {} fsdp {} tensor {}".format(*split)


def test_there_are_ten_splits_of_eight():
    assert len(SPLITS) == 10 and all(r * f * t == 8 for r, f, t in SPLITS)


ON_DEMAND = [(4, 2, 1), (4, 1, 2), (2, 1, 4), (1, 4, 2), (1, 1, 8)]
"""Splits that differ from the others in sizes alone."""


@pytest.mark.parametrize(
    "split", [pytest.param(s, marks=pytest.mark.slow if s in ON_DEMAND else (), id=name_of(s)) for s in SPLITS]
)
def test_every_split_computes_what_one_device_does(split, run, capfd):
    same(run, "uneven", split)
    assert "rematerialization" not in capfd.readouterr().err, "the compiler replicates an activation"


@pytest.mark.parametrize("split", [(2, 2, 2)], ids=name_of)
def test_a_scanned_model_too(split, run):
    same(run, "scanned", split)


def test_microbatches_too(run):
    same(run, "microbatches", (2, 2, 2))


def test_recurrent_layers_too(run, capfd):
    split, alone = run("recurrent", "sgd", 2, 2, 2), run("recurrent", "sgd", 1, 1, 1)
    np.testing.assert_allclose(split["losses"], alone["losses"], rtol=1e-5)
    assert_equal(split["last"].params, alone["last"].params)
    assert "rematerialization" not in capfd.readouterr().err, "the compiler replicates an activation"


def test_dropout_draws_the_same_on_every_mesh(run):
    dropped, alone = run("dropout", "sgd", 2, 2, 2), run("dropout", "sgd", 1, 1, 1)
    np.testing.assert_allclose(dropped["losses"], alone["losses"], rtol=1e-5)
    without = run("scanned", "sgd", 1, 1, 1)
    assert not np.allclose(alone["losses"], without["losses"], rtol=1e-3)


@pytest.mark.parametrize("split", [(2, 2, 2), (1, 2, 4)], ids=name_of)
def test_moments_lie_where_their_parameters_do(split, run, tiny_config):
    state = run("uneven", "adamw", *split)["last"]
    specs = parameter_specs(Transformer(tiny_config(**MODELS["uneven"]).model))
    moments = [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]
    split_leaves = 0
    for (path, param), spec, *leaves in zip(
        jax.tree_util.tree_leaves_with_path(state.params),
        jax.tree.leaves(specs, is_leaf=is_spec),
        *map(jax.tree.leaves, moments),
        strict=True,
    ):
        name = jax.tree_util.keystr(path)
        layout = sharding(param.sharding.mesh, spec.axes, spec.shape)
        for leaf in (param, *leaves):
            assert leaf.sharding.is_equivalent_to(layout, leaf.ndim), name
            assert {shard.data.shape for shard in leaf.addressable_shards} == {layout.shard_shape(spec.shape)}, name
        split_leaves += layout.shard_shape(spec.shape) != spec.shape
    assert split_leaves >= 12
    for scalar in (state.step, state.nonfinite_steps, optax.tree_utils.tree_get(state.opt_state, "count")):
        assert scalar.sharding.is_fully_replicated
    assert state.step == NUM_STEPS


@pytest.fixture
def created(tiny_config):
    config = tiny_config(**MODELS["uneven"], parallel={"replica": 1, "fsdp": 2, "tensor": 4})
    mesh = make_mesh(config)
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    return config, model, optimizer, state_shardings(model, optimizer, mesh)


def test_a_state_is_created_in_its_layout_with_one_devices_values(created):
    config, model, optimizer, shardings = created
    state = create_state(config, model, optimizer, shardings)
    abstract = abstract_state(model, optimizer, shardings)
    expected = jax.jit(lambda: initial_state(model, optimizer, config.seed))()
    assert jax.tree.structure(state) == jax.tree.structure(abstract) == jax.tree.structure(expected)
    for one, other, shape in zip(*map(jax.tree.leaves, (state, expected, abstract)), strict=True):
        assert (one.shape, one.dtype) == (shape.shape, shape.dtype)
        assert one.sharding.is_equivalent_to(shape.sharding, one.ndim)
        # The last bit of a normal deviate depends on the code that LLVM makes for its shape.
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_creation_holds_no_whole_array(created):
    _, model, optimizer, shardings = created
    program: Any = jax.jit(lambda: initial_state(model, optimizer, 0), out_shardings=shardings).lower().compile()
    sizes = [
        np.prod([int(d) for d in dims.split(",")]) for dims in re.findall(r"[fu]32\[([\d,]+)\]", program.as_text())
    ]
    specs = jax.tree.leaves(parameter_specs(model), is_leaf=is_spec)
    layouts = jax.tree.leaves(shardings.params)
    shards = [np.prod(layout.shard_shape(spec.shape)) for layout, spec in zip(layouts, specs, strict=True)]
    # A little more than a shard while the padding rows are put at the end.
    assert max(sizes) < 1.1 * max(shards) < max(np.prod(spec.shape) for spec in specs) / 7

"""Every split of eight simulated devices computes what one device does.

Two programs a split: ten steps of AdamW, whose losses and first gradient are compared, and ten of plain SGD, whose last
parameters are (Adam turns rounding noise in gradients of zero into whole steps). Equal means ||a - b|| <= 1e-5 ||b||.
"""

import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from transformer.config import MESH_AXES, Config, ConfigError, replace
from transformer.models import causal_blocks
from transformer.models.parameters import ParameterSpec, init_parameters, is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import RULES, batch_sharding, make_mesh, replicated, use_rules
from transformer.training.state import TrainState, abstract_state, create_state, initial_state, state_shardings
from transformer.training.step import make_train_step

NUM_STEPS = 10

DENSE = {
    "vocab_size": 61,
    "num_layers": 4,
    "width": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "feedforward_width": 32,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "tied_embeddings": False,
    "initial_scale": 0.1,
    "scan_layers": True,
}
EXPERTS = DENSE | {"layers": "attention/experts", "num_experts": 4, "expert_width": 16, "balance_loss": 0.05}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model": DENSE, "objective": {"z_loss": 1e-3}},
    # Two heads of keys, biases, a table of positions, layers one by one.
    "plain": {
        "model": {
            **DENSE,
            "num_layers": 2,
            "norm": "layernorm",
            "activation": "gelu",
            "tied_embeddings": True,
            "positions": "learned",
            "num_positions": 16,
            "biases": True,
            "attention_implementation": "causal_blocks",
            "scan_layers": False,
        }
    },
    "experts": {"model": EXPERTS | {"balance_bias_rate": 0.01, "num_shared_experts": 1}},
    # Twice as many parts as in which tokens travel otherwise.
    "experts in pieces": {"model": EXPERTS | {"expert_pieces": 2}},
    "capacity": {"model": EXPERTS | {"expert_capacity_factor": 0.8}},
    "pairs": {
        "model": DENSE | {"architecture": "encoder_decoder", "num_kv_heads": 4, "num_layers": 2},
        "objective": {"name": "seq2seq"},
        "data": {"source_path": ("read",), "target_path": ("write",)},
    },
    "deep pairs": {
        "model": DENSE | {"architecture": "encoder_decoder", "num_kv_heads": 4, "num_layers": 4},
        "objective": {"name": "seq2seq"},
        "data": {"source_path": ("read",), "target_path": ("write",)},
    },
    # BERT and T5, with all that other models do not have.
    "bert": {
        "model": {
            **DENSE,
            "architecture": "encoder",
            "norm": "layernorm",
            "norm_placement": "post",
            "activation": "gelu_exact",
            "tied_embeddings": True,
            "num_kv_heads": 4,
            "positions": "learned",
            "num_positions": 16,
            "biases": True,
            "embedding_norm": True,
            "num_token_types": 2,
            "head_transform": True,
            "head_bias": True,
        },
        "objective": {"name": "masked_lm"},
    },
    "t5": {
        "model": DENSE
        | {"architecture": "encoder_decoder", "num_kv_heads": 4, "num_layers": 2, "positions": "relative"}
        | {"attention_scale": 1.0, "logit_scale": 0.25, "num_relative_buckets": 8, "max_relative_distance": 12},
        "objective": {"name": "seq2seq"},
        "data": {"source_path": ("read",), "target_path": ("write",)},
    },
    "microbatches": {"model": DENSE | {"remat": "full"}, "train": {"num_microbatches": 2}},
    "dropout": {"model": DENSE | {"dropout": 0.1}},
    "recurrent": {"model": DENSE | {"layers": "lstm/none", "recurrent_width": 24, "positions": "none"}},
}

ALWAYS = (
    ("dense", "replica=2 fsdp=2 tensor=2"),
    ("dense", "fsdp=2 tensor=2 sequence_sharding"),
    ("dense", "replica=4 fsdp=2 shard_optimizer"),
    ("experts", "fsdp=2 expert=2 tensor=2"),
    ("pairs", "fsdp=4 tensor=2"),
)
"""Rows of the table that every run of the suite computes."""
TABLE = (
    *ALWAYS,
    # A dense decoder: each axis alone, pairs, triples.
    ("dense", "replica=8"),
    ("dense", "fsdp=8"),
    ("dense", "tensor=4"),
    ("dense", "context=4"),
    ("dense", "stage=4"),
    ("dense", "replica=2 fsdp=4"),
    ("dense", "replica=4 fsdp=2"),
    ("dense", "replica=2 tensor=4"),
    ("dense", "replica=2 context=4"),
    ("dense", "replica=2 stage=4"),
    ("dense", "fsdp=4 tensor=2"),
    ("dense", "fsdp=2 context=4"),
    ("dense", "fsdp=2 stage=4"),
    ("dense", "context=2 tensor=4"),
    ("dense", "stage=2 context=4"),
    ("dense", "stage=2 tensor=4"),
    ("dense", "replica=2 fsdp=2 context=2"),
    ("dense", "replica=2 stage=2 tensor=2"),
    ("dense", "fsdp=2 context=2 tensor=2"),
    ("dense", "stage=2 fsdp=2 tensor=2"),
    ("dense", "stage=2 fsdp=2 context=2"),
    ("dense", "replica=2 tensor=4 sequence_sharding"),
    ("dense", "replica=2 fsdp=2 tensor=2 shard_optimizer"),
    ("dense", "context=2 tensor=4 sequence_sharding"),
    ("plain", "replica=2 tensor=4"),
    ("plain", "replica=2 fsdp=2 tensor=2"),
    ("plain", "fsdp=8"),
    # Experts.
    ("experts", "replica=8"),
    ("experts", "fsdp=8"),
    ("experts", "expert=4"),
    ("experts", "tensor=4"),
    ("experts", "context=4"),
    ("experts", "stage=4"),
    ("experts", "replica=2 expert=4"),
    ("experts", "fsdp=2 expert=4"),
    ("experts", "fsdp=4 expert=2"),
    ("experts", "expert=4 tensor=2"),
    ("experts", "expert=2 context=4"),
    ("experts", "stage=2 expert=4"),
    ("experts", "replica=2 fsdp=2 expert=2"),
    ("experts", "replica=2 expert=2 tensor=2"),
    ("experts", "expert=2 context=2 tensor=2"),
    ("experts", "stage=2 fsdp=2 expert=2"),
    ("experts in pieces", "fsdp=2 expert=4"),
    ("capacity", "fsdp=2 expert=4"),
    ("capacity", "fsdp=2 expert=2 tensor=2"),
    ("capacity", "expert=2 context=2 tensor=2"),
    # A decoder that reads an encoder.
    ("pairs", "replica=8"),
    ("pairs", "fsdp=8"),
    ("pairs", "tensor=4"),
    ("pairs", "context=4"),
    ("deep pairs", "stage=4"),
    ("pairs", "fsdp=2 context=4"),
    ("pairs", "stage=2 fsdp=4"),
    ("pairs", "stage=2 tensor=4"),
    ("pairs", "replica=2 tensor=4"),
    ("pairs", "replica=2 fsdp=2 tensor=2"),
    ("pairs", "fsdp=2 context=2 tensor=2"),
    ("pairs", "stage=2 fsdp=2 tensor=2"),
    ("bert", "fsdp=8"),
    ("bert", "replica=2 fsdp=2 tensor=2"),
    ("bert", "fsdp=2 context=2 tensor=2"),
    ("bert", "stage=2 fsdp=2 tensor=2"),
    ("t5", "replica=2 fsdp=2 tensor=2"),
    ("t5", "fsdp=2 context=2 tensor=2"),
    ("t5", "stage=2 fsdp=2 tensor=2"),
)

OPTIMIZERS = {
    "adamw": {"learning_rate": 3e-3, "warmup_steps": 3},
    "sgd": {"name": "sgd", "learning_rate": 0.3, "clip_norm": 0.0, "schedule": "constant"},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in rows of 16 tokens, the last of them short."""
    monkeypatch.setattr(causal_blocks, "SMALLEST", 5)
    monkeypatch.setattr(causal_blocks, "MOST", 99)


def sizes_of(split: str) -> dict[str, int]:
    """Returns the size of every axis of the mesh; words of `split` that are no axis are options."""
    given = {name: int(size) for name, _, size in (word.partition("=") for word in split.split()) if size}
    return {axis: given.get(axis, 1) for axis in MESH_AXES}


def config_of(model: str, split: str = "", optimizer: str = "adamw") -> Config:
    """Returns the configuration of a row of the table."""
    data, train = {"sequence_length": 16, "tokenizer_vocab_size": 61}, {"batch_size": 8, "num_steps": NUM_STEPS}
    options = dict.fromkeys((word for word in split.split() if "=" not in word), True)
    config = replace(Config(), data=data, train=train, parallel=sizes_of(split) | options)
    config = replace(config, **MODELS[model], optimizer=OPTIMIZERS[optimizer])
    # A pipeline needs as many microbatches as it has stages; one device takes the whole batch at once.
    stages = config.parallel.stage
    return replace(config, train={"num_microbatches": stages}) if stages > 1 else config


def batch_of(config: Config, make: Any, seed: int) -> dict[str, np.ndarray]:
    batch = make(config, seed)
    if config.model.num_token_types:
        batch["token_types"] = (batch["positions"] % 3 == 0).astype(np.int32)
    if config.model.architecture == "encoder_decoder":
        read = make(config, seed + NUM_STEPS)
        batch |= {f"encoder_{name}": read[name] for name in ("inputs", "positions", "segment_ids")}
    return batch


def train(config: Config, batches: list[Any]) -> dict[str, Any]:
    """Returns the losses of all steps, compiled and laid out as in the loop, and the state after the first and the last."""
    mesh = make_mesh(config, jax.devices()[: math.prod(getattr(config.parallel, axis) for axis in MESH_AXES)])
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh), use_rules(config):
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
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
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, rows))
            losses.append(metrics["loss"].item())
            first = first or jax.device_get(state)
    return {"losses": losses, "first": first, "last": state}


@pytest.fixture(scope="module")
def run(tiny_batch: Any) -> Any:
    """Trains a model on a split of the devices with an optimizer, and on one, of which the result is kept."""

    @functools.cache
    def trained(model: str, split: str = "", optimizer: str = "adamw") -> dict[str, Any]:
        config = config_of(model, split, optimizer)
        return train(config, [batch_of(config, tiny_batch, seed) for seed in range(NUM_STEPS)])

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


def rows(always: int) -> list[Any]:
    """Returns the table for a test that every run of the suite makes with the first rows of it."""
    marks = [[] if number < always else [pytest.mark.slow] for number in range(len(TABLE))]
    return [pytest.param(*row, marks=mark, id=": ".join(row)) for row, mark in zip(TABLE, marks, strict=True)]


def test_the_table_has_every_axis_alone_pairs_and_triples() -> None:
    assert len(set(TABLE)) == len(TABLE)
    split = [(model, frozenset(a for a, size in sizes_of(words).items() if size > 1)) for model, words in TABLE]
    assert len(split) >= 40 and all(axes for _, axes in split)
    alone = {(model.removeprefix("deep "), *axes) for model, axes in split if len(axes) == 1}
    assert alone >= {(model, axis) for model in ("dense", "experts", "pairs") for axis in MESH_AXES if axis != "expert"}
    assert ("experts", "expert") in alone
    assert {axes for _, axes in split if len(axes) == 1} == {frozenset([axis]) for axis in MESH_AXES}
    pairs = {axes for _, axes in split if len(axes) == 2}
    assert len(pairs) == 15, "all of them"
    assert len({axes for _, axes in split if len(axes) == 3}) >= 8
    assert {model for model, axes in split if axes} >= {"dense", "experts", "capacity", "pairs"}
    assert all(math.prod(sizes_of(words).values()) in (4, 8) for _, words in TABLE)


@pytest.mark.parametrize(("model", "split"), rows(len(ALWAYS)))
def test_losses_and_gradients_are_those_of_one_device(model: str, split: str, run: Any, capfd: Any) -> None:
    """The first moment after the first step is the gradient, times a number that clipping decides."""
    many, one = run(model, split), run(model)
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert_equal(*(optax.tree_utils.tree_get(it["first"].opt_state, "mu") for it in (many, one)))
    assert_laid_out(config_of(model, split), many["last"])
    if model != "dense" or sizes_of(split)["tensor"] < 4:  # more devices than heads of keys
        assert "rematerialization" not in capfd.readouterr().err, "the compiler replicates an activation"


@pytest.mark.parametrize(("model", "split"), rows(0))
def test_parameters_after_descent_are_those_of_one_device(model: str, split: str, run: Any) -> None:
    many, one = run(model, split, "sgd"), run(model, "", "sgd")
    np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
    assert_equal(many["last"].params, one["last"].params)


@pytest.mark.parametrize(
    ("model", "split"),
    [
        ("dense", "replica=2 fsdp=2 tensor=2"),
        ("microbatches", "replica=2 fsdp=2 tensor=2"),
        pytest.param("recurrent", "replica=2 fsdp=2 tensor=2", marks=pytest.mark.slow),
        ("dropout", "fsdp=4 tensor=2 sequence_sharding"),
    ],
)
def test_so_are_some_in_every_run(model: str, split: str, run: Any) -> None:
    test_parameters_after_descent_are_those_of_one_device(model, split, run)


def test_dropout_is_on(run: Any) -> None:
    dropped, without = (run(name, "", "sgd")["losses"] for name in ("dropout", "dense"))
    assert not np.allclose(dropped, without, rtol=1e-3)


# What lies where.


def expected_pieces(spec: ParameterSpec, sizes: dict[str, int]) -> list[int]:
    """Returns in how many pieces each dimension has to be, by the table alone."""
    return [math.prod(sizes[axis] for axis in RULES[name]) for name in spec.axes]


def assert_laid_out(config: Config, state: TrainState) -> None:
    """Every parameter and moment is in the pieces that the table says: none is whole because a mesh does not divide it."""
    sizes = {axis: getattr(config.parallel, axis) for axis in MESH_AXES}
    specs = jax.tree.leaves(parameter_specs(Transformer(config.model)), is_leaf=is_spec)
    moments: dict[str, list[Any]] = {}
    for name in ("mu", "nu"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(optax.tree_utils.tree_get(state.opt_state, name)):
            moments.setdefault(jax.tree_util.keystr(path), []).append(leaf)
    num_split = 0
    for (path, param), spec in zip(jax.tree_util.tree_leaves_with_path(state.params), specs, strict=True):
        own = moments.get(jax.tree_util.keystr(path), [])
        assert len(own) == (0 if spec.role == "balance" else 2), path
        pieces = expected_pieces(spec, sizes)
        assert all(dim % n == 0 for dim, n in zip(spec.shape, pieces, strict=True)), (path, spec)
        shape = tuple(dim // n for dim, n in zip(spec.shape, pieces, strict=True))
        assert {shard.data.shape for shard in param.addressable_shards} == {shape}, (path, spec)
        parts = sizes["replica"] if config.parallel.shard_optimizer else 1
        for moment in own:
            (held,) = {shard.data.shape for shard in moment.addressable_shards}
            assert math.prod(held) * parts == math.prod(shape), (path, spec)
        num_split += shape != spec.shape
    assert num_split >= 3 or math.prod(sizes.values()) == sizes["replica"] * sizes["context"]
    for scalar in (state.step, state.nonfinite_steps, optax.tree_utils.tree_get(state.opt_state, "count")):
        assert scalar.sharding.is_fully_replicated
    assert state.step == NUM_STEPS


@pytest.mark.parametrize(("model", "split"), [row.values[:2] for row in rows(0)], ids=[row.id for row in rows(0)])
def test_no_split_leaves_whole_what_its_table_splits(model: str, split: str) -> None:
    config = config_of(model, split)
    sizes = sizes_of(split)
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    module = Transformer(config.model)
    specs = parameter_specs(module)
    optimizer = make_optimizer(config, specs)
    with use_rules(config):
        layouts = state_shardings(module, optimizer, mesh, config.parallel)
    for spec, layout in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(layouts.params), strict=True):
        shape = [dim // n for dim, n in zip(spec.shape, expected_pieces(spec, sizes), strict=True)]
        assert list(layout.shard_shape(spec.shape)) == shape, spec
    used = {axis for spec in jax.tree.leaves(specs, is_leaf=is_spec) for name in spec.axes for axis in RULES[name]}
    splitting = {axis for axis in ("fsdp", "expert", "tensor", "stage") if sizes[axis] > 1}
    assert splitting <= used, "an axis that splits no parameter"


@pytest.fixture
def created() -> Iterator[Any]:
    config = replace(
        config_of("plain", "fsdp=2 tensor=4"), model={"vocab_size": 203, "width": 48, "feedforward_width": 192}
    )
    mesh = make_mesh(config)
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    yield config, model, optimizer, state_shardings(model, optimizer, mesh)


def test_a_state_is_created_in_its_layout_with_one_devices_values(created: Any) -> None:
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


def test_creation_holds_no_whole_array(created: Any) -> None:
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


# What does not divide is refused.


@pytest.mark.parametrize(
    ("model", "split", "changes", "sentence"),
    [
        ("dense", "tensor=8", {}, "model.num_heads = 4 is not divisible by parallel.tensor = 8"),
        (
            "dense",
            "tensor=4",
            {"model": {"feedforward_width": 30}},
            "model.feedforward_width = 30 is not divisible by parallel.tensor = 4",
        ),
        (
            "experts",
            "tensor=4",
            {"model": {"expert_width": 18, "feedforward_width": 3}},
            "model.expert_width = 18 is not divisible by parallel.tensor = 4",
        ),
        ("experts", "expert=8", {}, "model.num_experts = 4 is not divisible by parallel.expert = 8"),
        (
            "dense",
            "expert=8",
            {},
            "parallel.expert = 8: model.layers = 'attention' has no experts; parallel.fsdp and parallel.replica split the "
            "batch as well",
        ),
        (
            "dense",
            "context=8",
            {"data": {"sequence_length": 20}},
            "data.sequence_length = 20 is not divisible by parallel.context = 8",
        ),
        (
            "pairs",
            "context=8",
            {"data": {"source_length": 12}},
            "data.source_length = 12 is not divisible by parallel.context = 8",
        ),
        (
            "dense",
            "tensor=4 sequence_sharding",
            {"data": {"sequence_length": 14}},
            "data.sequence_length = 14 is not divisible by parallel.context x parallel.tensor = 4",
        ),
    ],
)
def test_splits_that_do_not_divide_are_named(model: str, split: str, changes: Any, sentence: str) -> None:
    config = replace(config_of(model, split), **changes)
    with pytest.raises(ConfigError) as caught:
        make_mesh(config, jax.devices()[: math.prod(sizes_of(split).values())])
    assert caught.value.problems == (sentence,)


def test_what_a_rule_leaves_whole_need_not_divide() -> None:
    config = replace(config_of("dense", "tensor=8"), parallel={"rules": ("heads=", "kv_heads=")})
    assert make_mesh(config).shape["tensor"] == 8

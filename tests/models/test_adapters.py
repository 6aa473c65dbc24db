"""Low-rank adapters: nothing at the beginning, alone in learning, and the same when they are merged."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.checkpointing import bases
from transformer.config import AdapterConfig, Config, ConfigError, replace
from transformer.models import few_bits, flops
from transformer.models.adapters import adapted, adapters, at, base_of, begun, flops_per_token, merged, share, unmerged
from transformer.models.parameters import Tree, divide, init_parameters, join, num_parameters, parameter_specs
from transformer.models.transformer import Transformer, apply
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.state import TrainState, state_shardings
from transformer.training.step import make_gradient, make_train_step

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The levels of NF4: Dettmers et al. 2023, arXiv:2305.14314, appendix E."""


def logits(model: Transformer, params: Tree, batch: Any) -> np.ndarray:
    def run(params: Tree, batch: Any) -> Any:
        outputs = apply(model, params, batch)
        return outputs.logits(outputs.hidden)[..., : model.config.vocab_size]

    return np.asarray(jax.jit(run)(params, batch))


def with_base(config: Config, base: Tree, adapter: AdapterConfig) -> tuple[Transformer, Tree, Tree]:
    """Returns the model with adapters as they begin, what of it is trained, and what is frozen."""
    model = adapted(Transformer(config.model), adapter)
    held = jax.tree.map(lambda leaf: leaf, base)
    frozen = bases.frozen(model, held, make_mesh(config, jax.devices()[:1]))
    trained, _ = divide(init_parameters(model, jax.random.key(1)), parameter_specs(model))
    return model, begun(trained, held), frozen


def moved(trained: Tree) -> Tree:
    leaves, form = jax.tree.flatten(trained)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    return jax.tree.unflatten(
        form, [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    )


def distance(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_an_adapter_begins_as_nothing_bit_by_bit(kind: Any, rank: int, tiny_config: Any, tiny_batch: Any) -> None:
    config = tiny_config(model={"biases": True})
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    model, trained, frozen = with_base(config, base, AdapterConfig(kind=kind, rank=rank))
    batch = tiny_batch(config)
    expected = logits(Transformer(config.model), base, batch)
    assert np.array_equal(logits(model, join(trained, frozen), batch), expected)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("kept", ["none", "nf4"])
def test_merged_equals_unmerged(kind: Any, kept: Any, tiny_config: Any, tiny_batch: Any) -> None:
    config = tiny_config(model={"layers": "attention+attention/none", "activation": "swiglu"})
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    adapter = AdapterConfig(kind=kind, rank=3, base=kept, rank_stabilized=True, targets=("query", "value", "down"))
    model, trained, frozen = with_base(config, base, adapter)
    params, batch = join(moved(trained), frozen), tiny_batch(config)
    whole, plain = merged(model, params), Transformer(config.model)
    apart = logits(model, params, batch)
    assert distance(logits(plain, whole, batch), apart) < 1e-5
    assert distance(apart, logits(plain, base, batch)) > 1e-2
    if kind == "dora":
        with pytest.raises(ConfigError, match="norms of the base's columns"):
            unmerged(model, whole, moved(trained))
        return
    found, expected = unmerged(model, whole, moved(trained)), base_of(model, params)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert distance(np.asarray(one), np.asarray(other)) < 1e-6


def test_only_the_adapter_is_trained(tiny_config: Any, tiny_batch: Any) -> None:
    config = replace(tiny_config(), adapter={"kind": "lora", "rank": 2, "dropout": 0.2, "base_run": "x"})
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    model, trained, frozen = with_base(config, base, config.adapter)
    optimizer = make_optimizer(config, parameter_specs(model))
    state = TrainState(jnp.int32(0), trained, optimizer.init(trained), jnp.int32(0), frozen)
    new, metrics = jax.jit(make_train_step(config, model, optimizer))(state, tiny_batch(config))
    assert metrics["gradient_norm"] > 0
    assert {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)} == {"lora_a", "lora_b"}
    moments = [leaf for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(trained))
    for one, other in zip(jax.tree.leaves(new.frozen), jax.tree.leaves(frozen), strict=True):
        assert np.array_equal(one, other)
    assert any(np.any(one != other) for one, other in zip(*map(jax.tree.leaves, (new.params, trained)), strict=True))
    count = sum(leaf.size for leaf in jax.tree.leaves(trained))
    whole = count + num_parameters(Transformer(config.model))
    assert (
        share(model, parameter_specs(model)) == f"{count:,} of {whole:,} parameters are trained ({count / whole:.2%})"
    )


def test_gradients_are_those_of_the_matrices_that_they_stand_for(tiny_config: Any, tiny_batch: Any) -> None:
    """By the chain rule of W + s A B: A^T dW s is B's, and dW B^T s is A's."""
    config = replace(tiny_config(), adapter={"kind": "lora", "rank": 2, "base_run": "x"})
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    model, trained, frozen = with_base(config, base, config.adapter)
    trained, batch = moved(trained), tiny_batch(config)
    found, _ = jax.jit(make_gradient(config, model))(trained, batch, None, 1, frozen)
    plain = Transformer(config.model)
    whole, _ = jax.jit(make_gradient(tiny_config(), plain))(merged(model, join(trained, frozen)), batch, None)
    for path, linear in adapters(model).items():
        own, kernel = at(trained, path), at(whole, path)["kernel"] * linear.adapter.scale
        with jax.default_matmul_precision("highest"):
            expected = {"lora_a": kernel @ own["lora_b"].mT, "lora_b": own["lora_a"].mT @ kernel}
        for name, gradient in expected.items():
            assert distance(np.asarray(at(found, path)[name]), np.asarray(gradient)) < 1e-4, (path, name)


@pytest.mark.parametrize("mesh", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.slow
def test_every_split_has_the_same_gradient(mesh: dict[str, int], tiny_config: Any, tiny_batch: Any) -> None:
    config = replace(tiny_config(parallel=mesh), adapter={"kind": "dora", "rank": 2, "base": "int8", "base_run": "x"})
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    model, trained, frozen = with_base(tiny_config(), base, config.adapter)
    trained, batch = moved(trained), tiny_batch(config)
    expected, _ = jax.jit(make_gradient(tiny_config(), model))(trained, batch, None, 1, frozen)
    devices = make_mesh(config)
    layout = state_shardings(model, make_optimizer(config, parameter_specs(model)), devices)
    placed = jax.device_put((trained, frozen), (layout.params, layout.frozen))
    with jax.set_mesh(devices):
        split = jax.jit(lambda t, f, batch: make_gradient(config, model, layout.params)(t, batch, None, 1, f))
        found, _ = split(*placed, batch)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert distance(np.asarray(one), np.asarray(other)) < 1e-5


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.5 / 127.5), ("int4", 0.5 / 7.5), ("nf4", 0.16)])
def test_few_bits_are_as_near_as_their_levels(kind: str, bound: float) -> None:
    """Half the widest gap between levels, as a share of the largest weight of the block; scales are those of 64 rows."""
    kernel = jax.random.normal(jax.random.key(0), (3, 128, 24))
    codes, scales = few_bits.quantize(kernel, kind, 64)
    assert scales.shape == (3, 2, 24) and codes.shape == ((3, 128, 24) if kind == "int8" else (3, 64, 24))
    found = np.asarray(few_bits.matrix(codes, scales, kind)).reshape(3, 2, 64, 24)
    blocks = np.asarray(kernel).reshape(found.shape)
    assert np.all(np.abs(found - blocks) <= bound * np.abs(blocks).max(axis=2, keepdims=True) * 1.001)
    again = few_bits.matrix(*few_bits.quantize(jnp.asarray(found.reshape(kernel.shape)), kind, 64), kind)
    # The largest whole number is half a step short of the scale.
    largest = {"nf4": 1e-6, "int8": 0.005, "int4": 0.067}[kind]
    assert distance(np.asarray(again), found.reshape(kernel.shape)) < largest


def test_nf4_has_the_published_levels() -> None:
    """A weight becomes the nearest level times the block's largest."""
    kernel = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    found = np.asarray(few_bits.matrix(*few_bits.quantize(jnp.asarray(kernel), "nf4", 64), "nf4"))
    largest = np.abs(kernel).max(axis=0)
    levels = np.asarray(NF4, np.float32)
    nearest = levels[np.abs(kernel[..., None] / largest[:, None] - levels).argmin(-1)]
    np.testing.assert_allclose(found, nearest * largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (("qurey",), "attention", r"'qurey' is no linear map of this model: .*did you mean query"),
        (("up",), "attention/experts", "experts, which have no adapters"),
        (("key",), "latent_attention", "latent attention's map"),
    ],
)
def test_targets_that_cannot_be(targets: Any, layers: str, message: str, tiny_config: Callable[..., Config]) -> None:
    model = Transformer(tiny_config(model={"layers": layers}).model)
    with pytest.raises(ConfigError, match=message):
        adapted(model, AdapterConfig(kind="lora", targets=targets))


def test_a_fingerprint_tells_bases_apart(tiny_config: Any) -> None:
    config = tiny_config()
    base = init_parameters(Transformer(config.model), jax.random.key(0))
    found = bases.fingerprint(base)
    assert found == bases.fingerprint(jax.tree.map(jnp.copy, base))
    kernel = base["decoder"]["layers"]["mixer"]["query"]["kernel"]
    for other in (kernel.at[0, 0, 0].add(1e-6), kernel.at[0, 0].set(kernel[0, 1]).at[0, 1].set(kernel[0, 0])):
        changed = jax.tree.map(lambda leaf, other=other: other if leaf is kernel else leaf, base)
        assert bases.fingerprint(changed) != found
    wider = adapted(Transformer(dataclasses.replace(config.model, feedforward_width=64)), AdapterConfig(kind="lora"))
    assert any("feedforward/up/kernel is (2, 32, 128)" in problem for problem in bases.misfits(wider, base))


def test_flops_are_those_of_what_is_computed(tiny_config: Any) -> None:
    """Of each map the product and the gradient of its input; of the adapter all three."""
    config = tiny_config()
    model, length = adapted(Transformer(config.model), AdapterConfig(kind="lora", rank=3)), config.data.sequence_length
    found = flops.training_flops_per_token(config.model, length) + flops_per_token(model, length)
    matrices = 2 * 12 * 32**2 + 32 * 203
    scores = 2 * 2 * 2 * length * 32
    assert found == 4 * matrices + 3 * scores + 6 * 2 * 3 * (4 * 64 + 2 * 160)

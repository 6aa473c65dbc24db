"""Optimizers against rules written out in NumPy and double precision."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import Config, replace
from transformer.models.parameters import (
    ParameterSpec,
    abstract_parameters,
    is_spec,
    map_specs,
    parameter_specs,
    zeros,
)
from transformer.models.transformer import Transformer
from transformer.optimizers import OPTIMIZERS, evaluated, gradient_norm, make_optimizer


@pytest.fixture
def specs(tiny_config):
    model = {"biases": True, "positions": "learned", "tied_embeddings": False, "num_layers": 1}
    return parameter_specs(Transformer(tiny_config(model=model).model))


def spec(*shape, role, axes):
    return ParameterSpec(shape, axes, zeros, role)


TOY = {
    "table": spec(5, 3, role="embedding", axes=("vocab", "embed")),
    "head": spec(5, 3, role="head", axes=("vocab", "embed")),
    "layers": {
        "kernel": spec(2, 3, 4, role="matrix", axes=("layers", "embed", "mlp")),
        "norm": spec(2, 3, role="norm", axes=("layers", "norm")),
        "balance": spec(2, 4, role="balance", axes=("layers", "experts")),
    },
}
WEIGHTS = TOY | {"layers": {name: TOY["layers"][name] for name in ("kernel", "norm")}}
"""The same without what is not trained by gradients."""


def toy(model: Any = None, **optimizer: Any) -> Config:
    settings: Any = {"clip_norm": 0.0, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-2}
    return replace(Config(), optimizer=settings | optimizer, model=model or {})


def random_tree(specs, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: scale * rng.standard_normal(spec.shape), specs)


def run(optimizer: Any, params: Any, gradients: Any, rate: Any = 0.1) -> Any:
    """Applies the rule to each of `gradients`, as the step does; `rate` may be a list."""
    return trained(optimizer, params, gradients, rate)[0]


def trained(optimizer: Any, params: Any, gradients: Any, rate: Any = 0.1) -> tuple[Any, Any]:
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(params)
    rates = rate if isinstance(rate, list) else [rate] * len(gradients)
    for gradient, this in zip(gradients, rates, strict=True):
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        updates, state = optimizer.update(gradient, state, params, rate=jnp.float32(this))
        params = optax.apply_updates(params, updates)
    return params, state


def clipped(gradient, limit):
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda leaf: leaf * min(1, limit / norm), gradient)


def assert_close(actual, expected, rtol=1e-5):
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("clip_norm", [0.0, 1.0, 1e6])
def test_two_steps_of_adamw(clip_norm, specs, tiny_config):
    settings = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-2, "weight_decay": 0.3, "clip_norm": clip_norm}
    config = tiny_config(optimizer=settings)
    params, first, second = (random_tree(specs, seed) for seed in range(3))
    expected = params
    moments = squares = jax.tree.map(np.zeros_like, params)
    decay = map_specs(lambda spec: 0.3 if spec.role in ("matrix", "embedding", "head") else 0.0, specs)
    for count, gradient in enumerate((first, second), 1):
        gradient = clipped(gradient, clip_norm) if clip_norm else gradient
        moments = jax.tree.map(lambda m, g: 0.8 * m + 0.2 * g, moments, gradient)
        squares = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, squares, gradient)
        expected = jax.tree.map(
            lambda p, m, v, d, count=count: p
            - 0.1 * (m / (1 - 0.8**count) / (np.sqrt(v / (1 - 0.9**count)) + 1e-2) + d * p),
            expected, moments, squares, decay,
        )  # fmt: skip
    assert_close(run(make_optimizer(config, specs), params, [first, second]), expected)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_whatever_the_rule_only_matrices_embeddings_and_head_decay(name):
    params = random_tree(WEIGHTS, 0)
    after = run(make_optimizer(toy(name=name), WEIGHTS), params, [jax.tree.map(np.zeros_like, params)])
    factors = dict.fromkeys(("matrix", "embedding", "head"), 1 - 0.1 * 0.3)
    assert_close(after, jax.tree.map(lambda p, spec: factors.get(spec.role, 1.0) * p, params, WEIGHTS))


def test_only_matrices_embeddings_and_head_decay(specs, tiny_config):
    config = tiny_config(optimizer={"weight_decay": 0.5})
    params = random_tree(specs, 0)
    zero = jax.tree.map(np.zeros_like, params)
    after = run(make_optimizer(config, specs), params, [zero])
    moved = jax.tree.map(lambda a, p: not np.allclose(a, p), after, params)
    names = {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in
             jax.tree_util.tree_leaves_with_path(moved) if leaf}  # fmt: skip
    attention = {f"decoder/layers/mixer/{name}/kernel" for name in ("query", "key", "value", "output")}
    feedforward = {"decoder/layers/feedforward/up/kernel", "decoder/layers/feedforward/down/kernel"}
    assert names == {"embedding", "positions", "head"} | attention | feedforward
    roles = {spec.role for spec in jax.tree.leaves(specs, is_leaf=is_spec)}
    assert roles == {"matrix", "embedding", "head", "norm", "bias"}


def test_sgd_with_momentum_and_clipping(specs, tiny_config):
    params, first, second = (random_tree(specs, seed) for seed in range(3))
    config = tiny_config(optimizer={"name": "sgd", "momentum": 0.9, "clip_norm": 2.0})
    one, two = clipped(first, 2.0), clipped(second, 2.0)
    expected = jax.tree.map(lambda p, a, b: p - 0.1 * a - 0.1 * (0.9 * a + b), params, one, two)
    assert_close(run(make_optimizer(config, specs), params, [first, second]), expected)


def test_plain_sgd_keeps_nothing(specs, tiny_config):
    optimizer = make_optimizer(tiny_config(optimizer={"name": "sgd", "clip_norm": 0.0}), specs)
    params, gradient = random_tree(specs, 0), random_tree(specs, 1)
    assert jax.tree.leaves(optimizer.init(params)) == []
    assert_close(run(optimizer, params, [gradient]), jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))


def test_three_steps_of_lion():
    params, *gradients = (random_tree(WEIGHTS, seed) for seed in range(4))
    expected, moments = params, jax.tree.map(np.zeros_like, params)
    decay = map_specs(lambda spec: 0.3 if spec.role in ("matrix", "embedding", "head") else 0.0, WEIGHTS)
    for gradient in gradients:
        step = jax.tree.map(lambda m, g, p, d: np.sign(0.8 * m + 0.2 * g) + d * p, moments, gradient, expected, decay)
        expected = jax.tree.map(lambda p, s: p - 0.01 * s, expected, step)
        moments = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments, gradient)
    assert_close(run(make_optimizer(toy(name="lion"), WEIGHTS), params, gradients, 0.01), expected)


def test_three_steps_of_adafactor_whose_moments_are_outer_products():
    """Algorithm 4 of arXiv:1804.04235, with the sums that its line 8 divides, layer by layer."""
    specs = {
        "kernel": spec(2, 128, 130, role="matrix", axes=("layers", "embed", "mlp")),
        "norm": spec(2, 7, role="norm", axes=("layers", "norm")),
    }
    params, *gradients = (random_tree(specs, seed, 0.2) for seed in range(4))
    params["norm"][1] = 0.0  # its updates are as if it were 1e-3 large
    gradients[1]["kernel"] *= 30  # its update is clipped
    expected = {name: value.copy() for name, value in params.items()}
    row, column, square = np.zeros((2, 128)), np.zeros((2, 130)), np.zeros((2, 7))
    for count, gradient in enumerate(gradients, 1):
        keep = 1 - count**-0.8
        for layer in range(2):
            g = gradient["kernel"][layer]
            row[layer] = keep * row[layer] + (1 - keep) * np.sum(g**2 + 1e-30, axis=1)
            column[layer] = keep * column[layer] + (1 - keep) * np.sum(g**2 + 1e-30, axis=0)
            moment = np.outer(row[layer], column[layer]) / row[layer].sum()
            square[layer] = keep * square[layer] + (1 - keep) * (gradient["norm"][layer] ** 2 + 1e-30)
            updates = {"kernel": g / np.sqrt(moment), "norm": gradient["norm"][layer] / np.sqrt(square[layer])}
            for name, update in updates.items():
                weight = expected[name][layer]
                update = update / max(1, np.sqrt(np.mean(update**2)))
                size = max(1e-3, np.sqrt(np.mean(weight**2)))
                decay = 0.3 if name == "kernel" else 0
                expected[name][layer] = weight - 0.1 * (size * update + decay * weight)
    optimizer = make_optimizer(toy(name="adafactor"), specs)
    assert_close(run(optimizer, params, gradients), expected, 1e-4)
    shapes = {leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params))}
    assert shapes == {(), (1,), (2, 128), (2, 130), (2, 7)}


def test_adafactor_does_not_count_the_rows_that_pad_a_table():
    table = {"table": spec(6, 3, role="embedding", axes=("vocab", "embed"))}
    padded = {"table": dataclasses.replace(table["table"], shape=(16, 3), padding_rows=10)}
    params, gradient = random_tree(table, 0), random_tree(table, 1, 5.0)
    with_zeros = (jax.tree.map(lambda x: np.pad(x, ((0, 10), (0, 0))), tree) for tree in (params, gradient))
    wide_params, wide_gradient = with_zeros
    expected = run(make_optimizer(toy(name="adafactor"), table), params, [gradient])
    found = run(make_optimizer(toy(name="adafactor"), padded), wide_params, [wide_gradient])
    assert_close({"table": found["table"][:6]}, expected)
    assert not np.any(found["table"][6:])


def test_four_steps_of_schedule_free_and_its_average():
    """Algorithm 1 of arXiv:2405.15682: z, x and y kept apart, with weights by the square of the rate."""
    params, *gradients = (random_tree(WEIGHTS, seed) for seed in range(5))
    rates = [0.05, 0.1, 0.1, 0.1]
    decay = map_specs(lambda spec: 0.3 if spec.role in ("matrix", "embedding", "head") else 0.0, WEIGHTS)
    x = y = z = params
    squares, total = jax.tree.map(np.zeros_like, params), 0.0
    for count, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        squares = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g**2, squares, gradient)
        z = jax.tree.map(
            lambda z, y, g, v, d, count=count, rate=rate: z
            - rate * (g / (np.sqrt(v / (1 - 0.9**count)) + 1e-2) + d * y),
            z, y, gradient, squares, decay,
        )  # fmt: skip
        total += rate**2
        share = rate**2 / total
        x = jax.tree.map(lambda x, z, share=share: (1 - share) * x + share * z, x, z)
        y = jax.tree.map(lambda x, z: 0.8 * x + 0.2 * z, x, z)
    config = toy(name="schedule_free", schedule="constant")
    found, state = trained(make_optimizer(config, WEIGHTS), params, gradients, rates)
    assert_close(found, y)
    assert_close(evaluated(found, state), x)
    assert not np.allclose(x["table"], y["table"], rtol=1e-2)


@pytest.mark.parametrize("name", ["adamw", "muon", "schedule_free"])
def test_each_role_has_a_rate_of_its_own(name):
    params, gradient = random_tree(TOY, 0), random_tree(TOY, 1)
    config = toy(name=name, schedule="constant")
    plain = run(make_optimizer(config, TOY), params, [gradient])
    factors = {"matrix": 2.0, "embedding": 0.5, "head": 0.0, "norm": 3.0, "balance": 1.0}
    rates = {"matrix_rate": 2.0, "embedding_rate": 0.5, "head_rate": 0.0, "vector_rate": 3.0}
    scaled = run(make_optimizer(toy(name=name, schedule="constant", **rates), TOY), params, [gradient])
    expected = jax.tree.map(lambda p, q, spec: p + factors[spec.role] * (q - p), params, plain, TOY)
    assert_close(scaled, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_routers_bias_takes_steps_of_one_size(name):
    """Whatever the optimizer, its rate, clipping and decay, and without a part in the norm."""
    gradients = [random_tree(TOY, seed) for seed in (1, 2)]
    for gradient in gradients:
        gradient["layers"]["balance"] *= 1e6
    gradients[0]["layers"]["balance"][0, 0] = 0
    rates = {"clip_norm": 0.5, "schedule": "constant", "vector_rate": 7.0, "ema_decay": 0.0}
    config = toy({"balance_bias_rate": 0.25}, name=name, **rates)
    params = random_tree(TOY, 0)
    after = run(make_optimizer(config, TOY), params, gradients)
    signs = sum(np.sign(gradient["layers"]["balance"]) for gradient in gradients)
    np.testing.assert_allclose(after["layers"].pop("balance"), params["layers"]["balance"] - 0.25 * signs, rtol=1e-6)
    assert gradient_norm(gradients[0], TOY) < 1e3
    # The others are moved as if it did not exist.
    for tree in (params, *gradients):
        del tree["layers"]["balance"]
    assert_close(after, run(make_optimizer(config, WEIGHTS), params, gradients))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_gradient_is_not_clipped_to_nan(name):
    params = random_tree(TOY, 0)
    optimizer = make_optimizer(toy(name=name, clip_norm=1.0), TOY)
    after = run(optimizer, params, [jax.tree.map(np.zeros_like, params)] * 2)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(after))


def test_moments_are_float32_and_of_their_parameters_shape(tiny_config):
    model = Transformer(tiny_config().model)
    optimizer = make_optimizer(tiny_config(), parameter_specs(model))
    abstract = abstract_parameters(model)
    state = jax.eval_shape(optimizer.init, abstract)
    moments = optax.tree_utils.tree_get_all_with_path(state, "mu") + optax.tree_utils.tree_get_all_with_path(
        state, "nu"
    )
    assert len(moments) == 2
    for _, tree in moments:
        shapes = jax.tree.map(lambda one, other: (one.shape, one.dtype) == (other.shape, other.dtype), tree, abstract)
        assert all(jax.tree.leaves(shapes))

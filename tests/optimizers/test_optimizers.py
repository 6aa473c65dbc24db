"""Optimizers against rules written out in NumPy and double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.models.parameters import abstract_parameters, is_spec, map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import OPTIMIZERS, make_optimizer


@pytest.fixture
def specs(tiny_config):
    model = {"biases": True, "positions": "learned", "tied_embeddings": False, "num_layers": 1}
    return parameter_specs(Transformer(tiny_config(model=model).model))


def random_tree(specs, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: scale * rng.standard_normal(spec.shape), specs)


def run(optimizer, params, gradients, rate=0.1):
    """Applies the rule to each of `gradients`, as the step does."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient), state, params)
        params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
    return params


def clipped(gradient, limit):
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda leaf: leaf * min(1, limit / norm), gradient)


def assert_close(actual, expected):
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


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


def test_only_matrices_and_embeddings_decay(specs, tiny_config):
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


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_gradient_is_not_clipped_to_nan(name, specs, tiny_config):
    params = random_tree(specs, 0)
    optimizer = make_optimizer(tiny_config(optimizer={"name": name}), specs)
    after = run(optimizer, params, [jax.tree.map(np.zeros_like, params)])
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
        assert tree == abstract

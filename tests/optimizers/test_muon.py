"""Muon against its iteration written out matrix by matrix, and against optax's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from transformer.benchmarks.program import make_program
from transformer.config import Config, replace
from transformer.models.parameters import ParameterSpec, map_specs, parameter_specs, zeros
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.optimizers.muon import is_orthogonalized, orthogonalize
from transformer.training.state import create_state

SPECS = {
    "wide": ParameterSpec((3, 4, 10), ("layers", "embed", "mlp"), zeros, "matrix"),
    "tall": ParameterSpec((3, 12, 4), ("layers", "mlp", "embed"), zeros, "matrix"),
    "experts": ParameterSpec((2, 3, 6, 4), ("layers", "experts", "mlp", "embed"), zeros, "matrix"),
    "alone": ParameterSpec((8, 4), ("joined", "embed"), zeros, "matrix"),
    "embedding": ParameterSpec((7, 4), ("vocab", "embed"), zeros, "embedding"),
    "head": ParameterSpec((7, 4), ("vocab", "embed"), zeros, "head"),
    "bias": ParameterSpec((3, 4), ("layers", "norm"), zeros, "bias"),
    "filter": ParameterSpec((3, 2, 2, 4), ("layers", "state", "state", "embed"), zeros, "matrix"),
}
MATRICES = ("wide", "tall", "experts", "alone")


def config(**optimizer: Any) -> Config:
    settings: Any = {"name": "muon", "clip_norm": 0.0, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-2}
    return replace(Config(), optimizer=settings | optimizer)


def tree(seed: int, specs: Any = SPECS) -> Any:
    rng = np.random.default_rng(seed)
    return map_specs(lambda spec: rng.standard_normal(spec.shape).astype(np.float32), specs)


def steps(specs: Any, params: Any, gradients: Any) -> Any:
    optimizer: Any = make_optimizer(config(), specs)
    params, state = jax.tree.map(jnp.asarray, params), optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params, rate=jnp.float32(0.1))
        params = optax.apply_updates(params, updates)
    return params


def newton_schulz(matrix):
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def test_three_steps_matrix_by_matrix():
    params, *gradients = (tree(seed) for seed in range(4))
    found = steps(SPECS, params, gradients)
    for name in MATRICES:
        wanted = params[name].astype(np.float64).reshape(-1, *params[name].shape[-2:])
        for number, matrix in enumerate(wanted):
            momentum = np.zeros_like(matrix)
            for gradient in gradients:
                gradient = gradient[name].astype(np.float64).reshape(wanted.shape)[number]
                momentum = 0.95 * momentum + 0.05 * gradient
                update = newton_schulz(0.95 * momentum + 0.05 * gradient)
                matrix = matrix - 0.1 * (0.2 * np.sqrt(max(matrix.shape)) * update + 0.3 * matrix)
            np.testing.assert_allclose(found[name].reshape(wanted.shape)[number], matrix, rtol=1e-4, atol=1e-5)


def test_everything_else_is_adams():
    params, *gradients = (tree(seed) for seed in range(3))
    others = {name: spec for name, spec in SPECS.items() if name not in MATRICES}
    assert {name for name, spec in SPECS.items() if is_orthogonalized(spec)} == set(MATRICES)
    adam: Any = make_optimizer(config(name="adamw"), others)
    state: Any = None
    expected: Any = {name: jnp.asarray(params[name]) for name in others}
    for gradient in gradients:
        state = adam.init(expected) if state is None else state
        gradient = {name: jnp.asarray(gradient[name]) for name in others}
        updates, state = adam.update(gradient, state, expected, rate=jnp.float32(0.1))
        expected = optax.apply_updates(expected, updates)
    found = steps(SPECS, params, gradients)
    for name in others:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6, err_msg=name)


def test_the_first_step_is_that_of_optax():
    names = ("wide", "tall", "alone")
    params, gradient = ({name: tree(seed)[name] for name in names} for seed in range(2))
    dims = {name: MuonDimensionNumbers(len(SPECS[name].shape) - 2, -1) for name in names}
    rule: Any = optax.contrib.muon(0.1, weight_decay=0.3, muon_weight_dimension_numbers=dims, consistent_rms=0.2)
    updates, _ = rule.update(gradient, rule.init(params), params)
    found = steps({name: SPECS[name] for name in names}, params, [gradient])
    for name in names:
        np.testing.assert_allclose(found[name], params[name] + updates[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_layers_stored_together_move_as_if_apart(tiny_config):
    params, *gradients = (tree(seed) for seed in range(3))
    together = steps(SPECS, params, gradients)
    for name in ("wide", "experts"):
        spec = SPECS[name]
        single = {name: dataclasses.replace(spec, shape=spec.shape[1:], axes=spec.axes[1:])}
        for layer in range(spec.shape[0]):
            own = [{name: values[name][layer]} for values in (params, *gradients)]
            alone = steps(single, own[0], own[1:])
            np.testing.assert_allclose(together[name][layer], alone[name], rtol=1e-5, atol=1e-6)
    # A model that loops over its layers has the same parameters as one that does not.
    scanned, unrolled = (
        map_specs(
            lambda spec: (spec.shape, spec.axes, spec.role, is_orthogonalized(spec)),
            parameter_specs(Transformer(tiny_config(model={"scan_layers": scan}).model)),
        )
        for scan in (True, False)
    )
    assert scanned == unrolled
    assert scanned["decoder"]["layers"]["mixer"]["query"]["kernel"][-1] and not scanned["embedding"][-1]


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (2, 3, 16, 8)])
def test_singular_values_end_up_near_one(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    values = np.linalg.svd(orthogonalize(jnp.asarray(x)), compute_uv=False)
    assert values.shape[-1] == min(shape[-2:])
    assert values.min() > 0.5 and values.max() < 1.25


def test_an_update_is_as_large_as_adams():
    """A root mean square of 0.2, whatever the shape."""
    gradient = {name: tree(1)[name] for name in MATRICES}
    zero = jax.tree.map(np.zeros_like, gradient)
    moved = steps({name: SPECS[name] for name in MATRICES}, zero, [gradient])
    for name in MATRICES:
        assert np.sqrt(np.mean(np.square(moved[name]))) == pytest.approx(0.1 * 0.2, rel=0.2), name


def test_a_step_is_the_same_with_layers_scanned_and_unrolled():
    shape = {"num_layers": 3, "width": 16, "num_heads": 2}
    base = replace(
        Config(),
        data={"tokenizer": "bytes", "sequence_length": 16},
        model=shape,
        optimizer={"name": "muon", "learning_rate": 1e-2, "warmup_steps": 0},
        train={"batch_size": 8, "num_steps": 2},
    )
    found = {}
    for scan in (True, False):
        program = make_program(replace(base, model={"scan_layers": scan}))
        before = jax.device_get(create_state(program.config, program.model, *program._optimizer()).params)
        program()
        assert program.state is not None
        found[scan] = jax.tree.map(lambda after, at: np.asarray(after) - at, program.state.params, before)
    matrices = 0
    for scanned, unrolled in zip(*map(jax.tree.leaves, found.values()), strict=True):
        np.testing.assert_allclose(scanned, unrolled, atol=1e-5)
        matrices += scanned.ndim == 3 and float(np.abs(scanned).max()) > 1e-4
    assert matrices >= 4

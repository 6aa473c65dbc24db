"""Products with operands of eight bits: how far from exact, that their types are what they say, and that models train."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.benchmarks.program import make_program
from transformer.config import Config, problems_of, replace
from transformer.models.eight_bits import eight_bit_product
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer, apply
from transformer.objectives import objective_of

TOLERANCES = {"int8": (0.015, 0.015, 1e-6), "fp8": (0.04, 0.065, 0.065)}
"""Relative error of the output, of the gradient toward the input, and of that of the weights, for normal deviates: int8
rounds to 1 / 127 of the largest of a row or column, e4m3 to 2 ** -4 and e5m2 to 2 ** -3 of each number."""

TYPES = {"int8": ("i8",), "fp8": ("f8E4M3FN", "f8E5M2")}


def error(found: jax.Array, exact: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("name", TOLERANCES)
@pytest.mark.parametrize(
    ("rows", "dtype"),
    [((50,), jnp.float32), ((3, 17), jnp.bfloat16), pytest.param((3, 17), jnp.float32, marks=pytest.mark.slow)],
    ids=["matrix", "rows of texts in bfloat16", "rows of texts"],
)
def test_products_and_gradients_are_near_the_exact_ones(name: str, rows: tuple[int, ...], dtype: Any) -> None:
    rng = np.random.default_rng(0)
    # Rows and columns of very different size: one scale for all would lose the small ones.
    x = rng.standard_normal((*rows, 96)) * np.geomspace(1, 100, rows[-1])[:, None]
    kernel = rng.standard_normal((96, 33)) * np.geomspace(1, 100, 33)
    ahead = rng.standard_normal((*rows, 33))
    x, kernel, ahead = (jnp.asarray(a, dtype) for a in (x, kernel, ahead))
    product, gradient = jax.vjp(lambda x, kernel: eight_bit_product(x, kernel, name), x, kernel)
    found: list[Any] = [product, *gradient(ahead)]
    x64, k64, a64 = (np.asarray(a, np.float64) for a in (x, kernel, ahead))
    flat = x64.reshape(-1, 96), a64.reshape(-1, 33)
    exact = (x64 @ k64, a64 @ k64.T, flat[0].T @ flat[1])
    for one, wanted, tolerance in zip(found, exact, TOLERANCES[name], strict=True):
        assert one.dtype == dtype and one.shape == wanted.shape
        assert error(one, wanted) < tolerance + (0.01 if dtype == jnp.bfloat16 else 0)
    assert error(found[0], exact[0]) > 1e-4, "nothing was rounded"
    for column in range(33):
        assert error(found[0][..., column], exact[0][..., column]) < 2 * TOLERANCES[name][0] + 0.01


def test_a_row_of_zeros_stays_one() -> None:
    for name in TOLERANCES:
        product: Any
        product, gradient = jax.vjp(
            lambda x, k, name=name: eight_bit_product(x, k, name), jnp.zeros((4, 8)), jnp.ones((8, 2))
        )
        assert not product.any() and all(np.isfinite(part).all() for part in gradient(jnp.zeros((4, 2))))


def config_of(tiny_config: Any, name: str, **parallel: int) -> Config:
    model = {"matrix_products": name, "vocab_size": 260, "positions": "learned"}
    optimizer = {"learning_rate": 1e-2, "schedule": "constant"}
    config = tiny_config(model=model, data={"tokenizer": "bytes"}, optimizer=optimizer, train={"num_steps": 100})
    return replace(config, parallel=parallel or {"fsdp": 8}, compilation_cache_dir="")


@pytest.mark.parametrize("name", TOLERANCES)
def test_every_linear_map_of_a_model_and_nothing_else(name: str, tiny_config: Any, tiny_batch: Any) -> None:
    config = config_of(tiny_config, name)
    model = Transformer(config.model)
    batch = jax.tree.map(jnp.asarray, tiny_batch(config))

    def loss(params: Any) -> jax.Array:
        terms = objective_of(config).terms(config.objective, apply(model, params, batch), batch)
        return terms.losses["cross_entropy"][0]

    params = init_parameters(model, jax.random.key(0))
    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    rounded = [line for line in dots if any(kind in line for kind in TYPES[name])]
    # Query, key, value, output, up, down in each of two layers: forward and toward the input, in fp8 the weights' as well.
    assert len(rounded) == 2 * 6 * {"int8": 2, "fp8": 3}[name]
    assert all("f32" not in line.partition("(tensor")[2].partition("->")[0] for line in rounded)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_model_trains_and_eight_devices_do_as_one(name: str, tiny_config: Any) -> None:
    """On one batch again and again; the largest of a row is the same however the row is split."""
    cases = (("compute_dtype", {}), (name, {}), (name, {"replica": 2, "fsdp": 2, "tensor": 2}))
    configs = [replace(config_of(tiny_config, kind, **split), model={"num_layers": 1}) for kind, split in cases]
    exact, split, mixed = map(make_program, configs)
    losses = np.array([[float(step()["loss"]) for step in (exact, split, mixed)] for _ in range(12)])
    assert losses[-1, 0] < losses[0, 0] - 0.5
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], atol=0.05)
    # Another order of sums makes a few numbers round the other way.
    np.testing.assert_allclose(losses[0, 2], losses[0, 1], rtol=1e-4)
    np.testing.assert_allclose(losses[:3, 2], losses[:3, 1], rtol=5e-3)


def test_without_qwix_it_is_a_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(Config(), model={"matrix_products": "int8"})
    assert not problems_of(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (problem,) = problems_of(config)
    assert problem.startswith("model.matrix_products = 'int8' needs the package qwix")

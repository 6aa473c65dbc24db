"""Latent attention against its equations in NumPy, in both forms; what its cache holds."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ConfigError, LayerKind, ModelConfig, validate
from transformer.models import latent_attention
from transformer.models.latent_attention import LatentAttention, absorbed_is_cheaper
from transformer.models.masks import Tokens
from transformer.models.mixers import Context
from transformer.models.parameters import abstract_parameters, bind

CONFIG = ModelConfig(
    vocab_size=7,
    width=12,
    num_heads=3,
    head_width=4,
    layers="latent_attention",
    latent_width=5,
    rotary_head_width=6,
    norm="rmsnorm",
    attention_implementation="reference",
)
LENGTH = 7
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [0, 0, 3, 3, 3, 3, 3]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2], [0, 0, 0, 1, 2, 3, 4]], np.int32)


def reference(config: ModelConfig, params: Any, x: np.ndarray) -> np.ndarray:
    """DeepSeek-V2, equations 9 to 19, token by token and head by head."""

    def linear(name: str, y: np.ndarray) -> np.ndarray:
        return y @ params[name]["kernel"] + params[name].get("bias", 0)

    def norm(name: str, y: np.ndarray) -> np.ndarray:
        return y / np.sqrt(np.mean(y**2, axis=-1, keepdims=True) + config.norm_epsilon) * params[name]["scale"]

    def turn(y: np.ndarray, position: int) -> np.ndarray:
        half = len(y) // 2
        planes = (y[:half] + 1j * y[half:]) * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
        return np.concatenate([planes.real, planes.imag])

    head, output = config.head_dim, np.zeros_like(x)
    for row in range(len(x)):
        latent, shared = norm("latent_norm", linear("latent", x[row])), linear("rotary_key", x[row])
        narrow = norm("query_norm", linear("query_latent", x[row])) if "query_latent" in params else x[row]
        query = linear("query", narrow).reshape(LENGTH, config.num_heads, -1)
        key, value = (linear(name, latent).reshape(LENGTH, config.num_heads, head) for name in ("key", "value"))
        for t in np.flatnonzero(SEGMENTS[row]):
            past = [s for s in range(t + 1) if SEGMENTS[row, s] == SEGMENTS[row, t]]
            mixed = []
            for n in range(config.num_heads):
                turned = turn(query[t, n, head:], POSITIONS[row, t])
                rotary = np.array([turned @ turn(shared[s], POSITIONS[row, s]) for s in past])
                logits = (key[past, n] @ query[t, n, :head] + rotary) / math.sqrt(head + config.rotary_head_width)
                weights = np.exp(logits - logits.max())
                mixed.append(weights / weights.sum() @ value[past, n])
            output[row, t] = linear("output", np.concatenate(mixed))
    return output


@pytest.mark.parametrize("changes", [{}, {"query_latent_width": 8, "biases": True}], ids=["plain", "of queries too"])
def test_both_forms_are_the_equations(changes, monkeypatch):
    config = dataclasses.replace(CONFIG, **changes)
    module, rng = LatentAttention(config, LayerKind("latent_attention"), 1), np.random.default_rng(0)
    params = jax.tree.map(lambda like: rng.standard_normal(like.shape) / 2, abstract_parameters(module))
    x = rng.standard_normal((2, LENGTH, config.width))
    expected = reference(config, params, x)
    params, x = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), (params, x))
    tokens = Tokens(jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS))
    cache = {n: jnp.zeros((1, *spec.shape)) for n, spec in module.cache_specs(2, LENGTH).items()}
    is_token = SEGMENTS != 0
    for is_absorbed in (None, False, True):
        monkeypatch.setattr(latent_attention, "absorbed_is_cheaper", lambda *_, choice=is_absorbed: choice)
        given = None if is_absorbed is None else cache

        def run(params, x, given=given):
            context = Context(tokens, tokens, None if given is None else jnp.int32(0))
            return bind(module, params)(x, context, given, 0)

        actual, kept = jax.jit(run)(params, x)
        error = np.linalg.norm(np.asarray(actual)[is_token] - expected[is_token])
        assert error <= 1e-5 * np.linalg.norm(expected[is_token]), is_absorbed
    # Of each token the latent, and one rotary key for all heads.
    assert {name: array.shape for name, array in kept.items()} == {
        "latent": (1, 2, LENGTH, 5),
        "rotary_key": (1, 2, LENGTH, 6),
    }


def test_the_form_with_fewer_products_is_taken():
    """DeepSeek-V2's widths: one token on a long text is best left in the latent, a text on itself is not."""
    config = dataclasses.replace(CONFIG, head_width=128, latent_width=512, rotary_head_width=64)
    assert absorbed_is_cheaper(config, 1, 4096)
    assert not absorbed_is_cheaper(config, 4096, 4096)
    # By hand: 2 x 512 x 128 for a column's key and value; 1,088 for a pair in the latent, 320 for one in the heads.
    assert absorbed_is_cheaper(config, 100, 4096) == (100 * 131_072 + 409_600 * 1088 < 4096 * 131_072 + 409_600 * 320)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 2}, r"num_kv_heads = 2 with model.layers = 'latent_attention': .*every head"),
        ({"qk_norm": True}, r"qk_norm = True with model.layers"),
        ({"rotary_head_width": 3}, r"rotary_head_width = 3: must be even"),
    ],
)
def test_what_cannot_be_is_said(changes, message, tiny_config):
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(model={"layers": "latent_attention"} | changes))
    validate(tiny_config(model={"layers": "attention"} | changes))

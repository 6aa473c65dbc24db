"""Luong's attention against a loop over single tokens in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.models.cache import map_cache, zeros
from transformer.models.luong import LuongAttention
from transformer.models.masks import Tokens
from transformer.models.mixers import Context, Memory
from transformer.models.parameters import bind, map_specs, parameter_specs

SEGMENTS = np.array([[1, 1, 1, 2, 2], [0, 3, 0, 3, 4], [0, 0, 0, 0, 0]])
SOURCE = np.array([[1, 2, 2, 0, 1, 1], [3, 3, 0, 0, 0, 3], [1, 1, 1, 1, 1, 1]])


def tokens_of(segments):
    segments = jnp.asarray(segments, jnp.int32)
    return Tokens(jnp.zeros_like(segments), segments)


def build(**changes):
    layer = LuongAttention(ModelConfig(width=8, num_heads=3, **changes), 2)
    rng = np.random.default_rng(0)
    params = map_specs(lambda spec: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32), parameter_specs(layer))
    x, memory = (jnp.asarray(rng.standard_normal((*ids.shape, 8)), jnp.float32) for ids in (SEGMENTS, SOURCE))
    return layer, params, x, memory


def run(layer):
    return jax.jit(lambda params, x, context, cache=None: bind(layer, params)(x, context, cache, 1))


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 8**-0.5), ({"attention_scale": 1.0}, 1.0), ({"parametrization": "mup", "base_width": 2}, 32**-0.5)],
)
def test_it_is_a_loop_over_tokens(changes, scale):
    layer, params, x, memory = build(**changes)
    tokens = tokens_of(SEGMENTS)
    actual, _ = run(layer)(params, x, Context(tokens, tokens, memory=Memory(memory, tokens_of(SOURCE))))
    weights, output = (np.asarray(params[name]["kernel"], np.float64) for name in ("key", "output"))
    states, source = np.asarray(x, np.float64), np.asarray(memory, np.float64)
    for row, t in np.ndindex(SEGMENTS.shape):
        places = np.flatnonzero((SOURCE[row] == SEGMENTS[row, t]) & (SEGMENTS[row, t] != 0))
        found = np.zeros(8)
        if places.size:
            scores = scale * (source[row, places] @ weights @ states[row, t])
            share = np.exp(scores - scores.max())
            found = share / share.sum() @ source[row, places]
        expected = np.tanh(np.concatenate([found, states[row, t]]) @ output)
        np.testing.assert_allclose(actual[row, t], expected, rtol=1e-4, atol=1e-5)


def test_what_the_encoder_read_is_kept():
    layer, params, x, memory = build()
    tokens, source = tokens_of(SEGMENTS), tokens_of(SOURCE)
    whole, _ = run(layer)(params, x, Context(tokens, tokens, memory=Memory(memory, source)))
    cache = zeros(map_cache(lambda spec: spec.stacked(2), layer.cache_specs(3, 6)))
    pieces = []
    for at in range(SEGMENTS.shape[1]):
        part = tokens_of(SEGMENTS[:, at : at + 1])
        context = Context(part, tokens, jnp.int32(at), memory=Memory(memory if at == 0 else None, source))
        piece, cache = run(layer)(params, x[:, at : at + 1], context, cache)
        pieces.append(piece)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), whole, rtol=1e-5, atol=1e-6)

"""Attention against a plain reference in double precision, its mask against a loop over pairs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.models import causal_blocks
from transformer.models.dot_product import dot_product_attention
from transformer.models.masks import Mask, Tokens


def reference(query, key, value, mask):
    """Softmax attention in float64, one query at a time; a query without a key gets zero."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    output = np.zeros_like(query)
    groups = query.shape[2] // key.shape[2]
    for b, t, n in np.ndindex(query.shape[:3]):
        keys = np.flatnonzero(mask[b, t])
        if keys.size:
            scores = key[b, keys, n // groups] @ query[b, t, n] / np.sqrt(query.shape[3])
            weights = np.exp(scores - scores.max())
            output[b, t, n] = weights / weights.sum() @ value[b, keys, n // groups]
    return output


def random_inputs(length, heads, kv_heads, head_width=8, scale=1.0) -> Any:
    """Query, key and value."""
    rng = np.random.default_rng(length + 10 * heads + kv_heads)
    shapes = [(3, length, heads, head_width), (3, length, kv_heads, head_width), (3, length, kv_heads, head_width)]
    return [jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for shape in shapes]


def random_segments(length):
    """Rows: one document; several, of which one token long; padding before, within and after."""
    rng = np.random.default_rng(length)
    segments = np.ones((3, length), np.int32)
    segments[1] = 1 + np.cumsum(rng.random(length) < 0.4)
    segments[2] = np.where(rng.random(length) < 0.4, 0, 1)
    segments[2, 0] = 0
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    positions = np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    positions[2] = np.maximum(np.cumsum(segments[2]) - 1, 0)
    return jnp.asarray(segments), jnp.asarray(positions, jnp.int32)


def mask_of(segments, positions):
    tokens = Tokens(positions, segments)
    return Mask(tokens, tokens)


@pytest.mark.parametrize("length", [1, 7, 16])
def test_mask_is_causality_within_documents(length):
    segments, positions = random_segments(length)
    mask = np.asarray(mask_of(segments, positions).visible())
    for b, t, s in np.ndindex(mask.shape):
        assert mask[b, t, s] == (s <= t and segments[b, t] == segments[b, s] and segments[b, t] != 0), (b, t, s)


def test_mask_of_a_continuation_sees_the_earlier_keys():
    segments, positions = random_segments(9)
    whole = np.asarray(mask_of(segments, positions).visible())
    part = mask_of(segments, positions).queries(6, 3).visible()
    np.testing.assert_array_equal(part, whole[:, 6:])


@pytest.mark.parametrize("length", [1, 7, 16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_attention_is_the_reference(length, heads, kv_heads):
    inputs = random_inputs(length, heads, kv_heads)
    mask = mask_of(*random_segments(length))
    expected = reference(*inputs, mask=np.asarray(mask.visible()))
    actual = jax.jit(dot_product_attention)(*inputs, mask=mask)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("length", "block"), [(1, 1), (7, 1), (7, 5), (16, 16), (16, 5), (33, 16), (33, 40)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_blocks_of_queries_give_the_values_and_gradients_of_all_at_once(length, heads, kv_heads, block, monkeypatch):
    """Also where the last block is short, documents are packed, and some queries see nothing."""
    monkeypatch.setattr(causal_blocks, "SMALLEST", block)
    monkeypatch.setattr(causal_blocks, "MOST", length)
    inputs: Any = random_inputs(length, heads, kv_heads)
    mask = mask_of(*random_segments(length))
    ahead = np.cos(np.arange(inputs[0].size)).reshape(inputs[0].shape)
    results = []
    for attend in (dot_product_attention, causal_blocks.causal_blocks):

        @jax.jit
        def differentiated(*inputs, attend=attend):
            output, backward = jax.vjp(lambda *x: attend(*x, mask=mask), *inputs)
            return output, *backward(jnp.asarray(ahead, jnp.float32))

        results.append(differentiated(*inputs))
    for whole, blocks in zip(*results, strict=True):
        # Of a single key the gradient of the scores is zero, but for rounding.
        assert np.linalg.norm(whole - blocks) <= 1e-6 * max(np.linalg.norm(whole), 1)


def test_blocks_leave_products_out():
    """Of 512 by 512 scores, eight blocks of 64 compute 64 by (64 + 128 + ... + 512): nine sixteenths."""
    places = jnp.zeros((1, 512), jnp.int32)
    mask = Mask(Tokens(places, places), Tokens(places, places))
    inputs = [jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)] * 3 + [mask]

    def scores(implementation: Any) -> int:
        # Differentiated, so that a rule of its own is taken apart.
        equations = jax.make_jaxpr(lambda q, *rest: jax.vjp(lambda q: implementation(q, *rest), q)[0])(*inputs).eqns
        outputs: Any = [e.outvars[0].aval for e in equations if e.primitive.name == "dot_general"]
        return sum(x.size for x in outputs if x.shape[-1] != 8)

    assert scores(dot_product_attention) == 2 * 512 * 512
    assert scores(causal_blocks.causal_blocks) == 2 * 512 * 512 * 9 // 16


def test_attention_with_scores_of_thousands_is_finite_and_right():
    inputs = random_inputs(7, 4, 2, scale=60.0)
    mask = mask_of(*random_segments(7))
    actual, backward = jax.vjp(lambda *x: dot_product_attention(*x, mask=mask), *inputs)
    np.testing.assert_allclose(actual, reference(*inputs, mask=np.asarray(mask.visible())), rtol=1e-3, atol=1e-3)
    assert all(np.all(np.isfinite(gradient)) for gradient in backward(actual))


def test_attention_in_bfloat16_keeps_its_softmax_in_float32():
    inputs: Any = [x.astype(jnp.bfloat16) for x in random_inputs(16, 4, 2)]
    mask = mask_of(*random_segments(16))
    actual = dot_product_attention(*inputs, mask=mask)
    assert actual.dtype == jnp.bfloat16
    error = np.asarray(actual, np.float64) - reference(*inputs, mask=np.asarray(mask.visible()))
    # bfloat16 has 8 bits; weights and output are rounded to it, their sum is not.
    assert np.max(np.abs(error)) < 2**-6


def test_a_query_that_sees_nothing_gives_zero_and_gets_no_gradient():
    inputs = random_inputs(7, 4, 2)
    segments, positions = random_segments(7)
    segments = segments.at[0].set(0)
    mask = mask_of(segments, positions)
    output, backward = jax.vjp(lambda *x: dot_product_attention(*x, mask=mask), *inputs)
    blind = np.asarray(segments) == 0
    assert blind[0].all() and blind[2].any() and not blind[1].any()
    assert np.all(np.asarray(output)[blind] == 0)
    for name, gradient in zip(("query", "key", "value"), backward(jnp.ones_like(output)), strict=True):
        assert np.all(np.isfinite(gradient)), name
        assert np.all(np.asarray(gradient)[blind] == 0), name
        assert np.any(np.asarray(gradient)[~blind] != 0), name


def test_each_key_head_serves_neighbouring_query_heads():
    query, key, value = random_inputs(7, 4, 2)
    mask = mask_of(*random_segments(7))
    grouped = dot_product_attention(query, key, value, mask)
    repeated = dot_product_attention(query, jnp.repeat(key, 2, axis=2), jnp.repeat(value, 2, axis=2), mask)
    np.testing.assert_allclose(grouped, repeated, rtol=1e-6, atol=1e-6)

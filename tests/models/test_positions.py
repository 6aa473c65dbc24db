"""Positions, and patterns of them, against their formulas and against loops."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.models.biases import RelativeBuckets, alibi_slopes
from transformer.models.patterns import Pattern
from transformer.models.positions import sinusoidal_positions
from transformer.models.rotary import rotary_angles, rotary_frequencies, rotate

RNG = np.random.default_rng(0)


def config(**changes: Any) -> ModelConfig:
    return ModelConfig(vocab_size=16, width=24, num_heads=2, scan_layers=False, **changes)


def test_sinusoidal_positions_are_those_of_the_paper():
    positions = np.array([[0, 1, 2, 511], [7, 0, 100, 3]])
    actual = sinusoidal_positions(jnp.asarray(positions, jnp.int32), 24)
    # The paper interleaves sines (even) and cosines (odd); here they stand side by side.
    exact = np.zeros((2, 4, 24))
    for i in range(12):
        exact[..., i] = np.sin(positions / 10_000 ** (2 * i / 24))
        exact[..., 12 + i] = np.cos(positions / 10_000 ** (2 * i / 24))
    np.testing.assert_allclose(actual, exact, atol=1e-4)


def turned(x, position, base=10_000.0):
    positions = jnp.full(x.shape[:2], position, jnp.int32)
    angles = rotary_angles(positions, config(rotary_base=base), x.shape[-1])
    return np.asarray(rotate(jnp.asarray(x, jnp.float32), angles), np.float64)


def test_rotation_is_a_product_with_complex_numbers():
    x = RNG.standard_normal((1, 1, 2, 8))
    frequencies = 500.0 ** (-np.arange(4) / 4)
    product = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * 13 * frequencies)
    expected = np.concatenate([product.real, product.imag], axis=-1)
    np.testing.assert_allclose(turned(x, 13, 500.0), expected, rtol=1e-5, atol=1e-5)


def test_rotated_products_depend_on_the_distance_alone():
    query, key = RNG.standard_normal((2, 1, 1, 3, 8))
    products = [np.sum(turned(query, m) * turned(key, n), -1) for m, n in [(5, 2), (3, 0), (103, 100)]]
    for product in products[1:]:
        np.testing.assert_allclose(product, products[0], rtol=1e-4, atol=1e-4)
    assert not np.allclose(products[0], np.sum(turned(query, 2) * turned(key, 5), -1), atol=0.01)
    np.testing.assert_allclose(turned(query, 0), query, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(turned(query, 77), axis=-1), np.linalg.norm(query, axis=-1), rtol=1e-5)


@pytest.mark.parametrize("share", [0.5, 0.25])
def test_a_part_of_a_head_is_turned_as_a_head_of_that_width(share):
    x = jnp.asarray(RNG.standard_normal((1, 3, 2, 16)), jnp.float32)
    positions = jnp.asarray([[0, 5, 9]])
    width = int(16 * share)
    actual = rotate(x, rotary_angles(positions, config(rotary_share=share), 16))
    alone = rotate(x[..., :width], rotary_angles(positions, config(), width))
    np.testing.assert_array_equal(actual[..., width:], x[..., width:])
    np.testing.assert_allclose(actual[..., :width], alone, rtol=1e-6)


def scaling(kind: str, **numbers: float) -> ModelConfig:
    return config(rotary_scaling=kind, rotary_factor=8.0, rotary_original_length=512, **numbers)


def test_linear_scaling_stretches_every_wavelength():
    np.testing.assert_allclose(rotary_frequencies(scaling("linear"), 64)[0] * 8, rotary_frequencies(config(), 64)[0])


def test_llama_3_scaling_stretches_what_turns_less_than_once():
    plain, (found, factor) = rotary_frequencies(config(), 64)[0], rotary_frequencies(scaling("llama3"), 64)
    for old, new in zip(plain, found, strict=True):
        wavelength = 2 * math.pi / old
        if wavelength < 512 / 4:
            expected = old
        elif wavelength > 512:
            expected = old / 8
        else:
            smooth = (512 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * old / 8 + smooth * old
        assert new == pytest.approx(expected, rel=1e-12)
    assert factor == 1 and np.any(found == plain) and np.any(found == plain / 8)


def test_yarn_interpolates_between_planes_that_turn_often_and_rarely():
    plain, (found, factor) = rotary_frequencies(config(), 64)[0], rotary_frequencies(scaling("yarn"), 64)
    # The planes that turn 32 times and once within 512 positions: 64 ln(512 / (2 pi r)) / (2 ln 10000).
    low, high = (64 * math.log(512 / (2 * math.pi * turns)) / (2 * math.log(10_000)) for turns in (32, 1))
    low, high = math.floor(low), math.ceil(high)
    for plane, (old, new) in enumerate(zip(plain, found, strict=True)):
        share = min(max((plane - low) / (high - low), 0), 1)
        assert new == pytest.approx(old * (1 - share) + old / 8 * share, rel=1e-12)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)
    cosine, sine = rotary_angles(jnp.asarray([[3]]), scaling("yarn"), 64)
    np.testing.assert_allclose(cosine**2 + sine**2, factor**2, rtol=1e-5)
    assert rotary_frequencies(scaling("yarn", rotary_attention_factor=0.75), 64)[1] == 0.75


@pytest.mark.parametrize("length", [100, 512, 1024])
def test_dynamic_scaling_begins_beyond_the_original_length(length):
    positions = jnp.arange(length)[None]
    actual = rotary_angles(positions, scaling("dynamic_ntk"), 16)
    base = 10_000 * (8 * max(length, 512) / 512 - 7) ** (16 / 14)
    expected = rotary_angles(positions, config(rotary_base=base), 16)
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    plain = rotary_angles(positions, config(), 16)
    assert np.allclose(actual, plain, atol=1e-3) == (length <= 512)


def test_slopes_are_those_that_were_published():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-n for n in range(1, 9)])
    # Twelve heads: those of eight, then every other of sixteen.
    np.testing.assert_allclose(alibi_slopes(12)[8:], [2 ** (-0.5 * n) for n in (1, 3, 5, 7)])


@pytest.mark.parametrize("causal", [False, True])
def test_buckets_are_those_of_a_loop(causal):
    """Half of the buckets are one distance each, the others grow to the largest distance as its logarithm does."""
    count, largest = 32, 128
    function = RelativeBuckets(jnp.zeros((count, 1)), causal, largest)
    offsets = np.arange(-300, 300)
    found = np.asarray(function.buckets(jnp.asarray(offsets)[None, None]))[0, 0]
    for offset, bucket in zip(offsets.tolist(), found.tolist(), strict=True):
        own, first = (count, 0) if causal else (count // 2, count // 2 if offset > 0 else 0)
        distance = max(-offset, 0) if causal else abs(offset)
        exact = own // 2
        expected = distance
        if distance >= exact:
            grown = exact + int(math.log(distance / exact) / math.log(largest / exact) * (own - exact) + 1e-6)
            expected = min(grown, own - 1)
        assert bucket == first + expected, offset


def test_a_bias_of_buckets_is_looked_up_for_every_head_and_learned():
    query, key = jnp.asarray([[4, 5]]), jnp.asarray([[0, 4, 9]])
    table = jnp.asarray(RNG.standard_normal((8, 3)), jnp.float32)
    values = RelativeBuckets(table, True, 16)(query, key)
    buckets = np.asarray(RelativeBuckets(table, True, 16).buckets(key[:, None] - query[:, :, None]))[0]
    for n, t, s in np.ndindex(3, 2, 3):
        assert values[0, n, t, s] == table[buckets[t, s], n]
    gradient = jax.grad(lambda table: jnp.sum(RelativeBuckets(table, True, 16)(query, key)))(table)
    np.testing.assert_array_equal(gradient, np.bincount(buckets.ravel(), minlength=8)[:, None] * np.ones(3))


@pytest.mark.parametrize("causal", [False, True])
def test_patterns_are_those_of_a_loop(causal):
    q, k = np.meshgrid(np.arange(24), np.arange(24), indexing="ij")
    distance, blocks = abs(q - k), (q // 4, k // 4)
    near, first = abs(blocks[0] - blocks[1]) <= 1, blocks[1] < 1
    expected = {
        Pattern("window", window=5): distance < 5,
        Pattern("window", window=5, num_sinks=2): (distance < 5) | (k < 2),
        Pattern("dilated", window=4, dilation=3): (distance % 3 == 0) & (distance < 12),
        Pattern("block_sparse", block=4, num_global=1, num_window=3): near | first | ((blocks[0] < 1) & (not causal)),
    }
    for pattern, allowed in expected.items():
        found = pattern.allows(jnp.asarray(q[None, :, :1]), jnp.asarray(k[None, :1]), causal)
        assert np.array_equal(np.broadcast_to(found[0], (24, 24)), allowed), pattern


def test_random_blocks_are_drawn_from_the_past_as_many_as_asked_for_at_any_length():
    pattern = Pattern("block_sparse", block=1, num_window=1, num_random=3)
    numbers = jnp.arange(400)[None]
    found = np.asarray(pattern.allows(numbers[:, :, None], numbers[:, None], True))[0]
    drawn = (found & ~np.eye(400, dtype=bool)).sum(axis=1)
    # Three draws, of which some hit the same block or the block itself.
    assert np.all(drawn <= 3) and np.mean(drawn[100:]) > 2.9 and not np.any(np.triu(found, 1))
    # Blocks are drawn evenly from the past: their mean place is its middle.
    rows, columns = np.nonzero(np.tril(found, -1)[100:])
    assert np.mean(columns / (rows + 100)) == pytest.approx(0.5, abs=4 * np.sqrt(1 / 12 / len(rows)))
    both = np.asarray(pattern.allows(numbers[:, :, None], numbers[:, None], False))[0]
    assert np.array_equal(both, found | found.T)

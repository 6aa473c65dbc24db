"""Products group by group against a loop over groups, in both forms; tokens there and back against plain indexing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.models import grouped

SIZES = np.array([3, 0, 11, 9, 0], np.int32)


def arrays(rows: int, *widths: int) -> list[Any]:
    rng = np.random.default_rng(rows)
    return [jnp.asarray(rng.standard_normal((rows, width)), jnp.float32) for width in widths]


def by_loop(x, weights, sizes):
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    output, groups = np.zeros((len(x), weights.shape[2])), np.repeat(np.arange(len(sizes)), sizes)
    for row, group in enumerate(groups):
        output[row] = x[row] @ weights[group]
    return output


@pytest.mark.parametrize("form", ["blocks", "ragged_dot"])
def test_products_are_those_of_each_group(form, monkeypatch):
    """Blocks of four rows: groups take several, a part of one, or none; and two rows belong to no group."""
    monkeypatch.setattr(grouped, "BLOCK", 4)
    product, outer = getattr(grouped, f"product_by_{form}"), getattr(grouped, f"outer_by_{form}")
    x, gradient = arrays(sum(SIZES) + 2, 5, 3)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((len(SIZES), 5, 3)), jnp.float32)
    np.testing.assert_allclose(jax.jit(product)(x, weights, SIZES), by_loop(x, weights, SIZES), rtol=1e-5, atol=1e-5)
    ends = np.cumsum(SIZES)
    pieces = [slice(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    expected = np.stack([np.asarray(x[piece], np.float64).T @ np.asarray(gradient[piece]) for piece in pieces])
    np.testing.assert_allclose(jax.jit(outer)(x, gradient, SIZES), expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_a_gather_of_matrices():
    x, ahead = arrays(sum(SIZES) + 2, 5, 3)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((len(SIZES), 5, 3)), jnp.float32)
    groups = np.repeat(np.arange(len(SIZES)), SIZES)

    def plain(x, weights):
        return jnp.pad(jnp.einsum("mi,mio->mo", x[: len(groups)], weights[groups]), ((0, 2), (0, 0)))

    sizes = jnp.asarray(SIZES)
    results = []
    for function in (plain, lambda x, weights: grouped.grouped_product(x, weights, sizes)):

        @jax.jit
        def differentiated(x, weights, function=function):
            output, backward = jax.vjp(function, x, weights)
            return output, *backward(ahead)

        results.append(differentiated(x, weights))
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_sorting_keeps_the_order_of_tokens():
    rng = np.random.default_rng(0)
    groups = np.stack([np.stack([rng.permutation(5)[:2] for _ in range(9)]) for _ in range(3)])
    groups[1, 4:6] = 4  # of no group
    order, sizes, rank = grouped.sort_by_group(jnp.asarray(groups, jnp.int32), 4)
    for row in range(3):
        flat = list(groups[row].ravel())
        expected = [choice for group in range(5) for choice in range(18) if flat[choice] == group]
        assert list(np.asarray(order[row])) == expected
        assert list(np.asarray(sizes[row])) == [flat.count(group) for group in range(4)]
        for choice, group in enumerate(flat):
            if group < 4:
                assert rank[row].ravel()[choice] == flat[:choice].count(group)


def test_tokens_find_their_places_and_back():
    """Three tokens with two choices, four places; one choice has no place, and the gradients are the transposes."""
    source = jnp.array([[4, 0, 6, 3]])  # the third place is empty
    target = jnp.array([[[1, 4], [4, 3], [0, 4]]])
    x = np.random.default_rng(0).standard_normal((1, 3, 2)).astype(np.float32)
    there = jax.jit(lambda y: grouped.dispatch(y, source, target))
    back = jax.jit(lambda y: grouped.collect(y, source, target))
    rows = np.asarray(there(x))
    np.testing.assert_array_equal(rows[0], [x[0, 2], x[0, 0], np.zeros(2), x[0, 1]])
    expected = [[rows[0, 1], np.zeros(2)], [np.zeros(2), rows[0, 3]], [rows[0, 0], np.zeros(2)]]
    np.testing.assert_array_equal(back(rows)[0], expected)
    for function, inputs in ((there, x), (back, rows)):
        output, backward = jax.vjp(function, inputs)
        ahead, other = (jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape) for y in (output, inputs))
        through = np.vdot(backward(ahead)[0], other)
        assert through == pytest.approx(float(np.vdot(ahead, function(other))), rel=1e-5)

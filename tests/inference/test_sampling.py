"""The distribution that tokens are drawn from."""

from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.inference.sampling import Sampling, kept_logits, sample_logits

PROBABILITIES = np.array([0.08, 0.4, 0.02, 0.25, 0.15, 0.1])


def draw(sampling: Sampling, num_draws: int = 20_000) -> np.ndarray:
    """Returns how often each token is drawn."""
    logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))
    keys = jax.random.split(jax.random.key(5), num_draws)
    tokens = jax.vmap(lambda key: sample_logits(logits, key, sampling.arrays()))(keys)
    return np.bincount(np.asarray(tokens), minlength=len(PROBABILITIES))


def chi_squared(counts: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's statistic of the tokens with positive weight."""
    kept = weights > 0
    expected = counts.sum() * weights[kept] / weights[kept].sum()
    return float(np.sum((counts[kept] - expected) ** 2 / expected))


@pytest.mark.parametrize(
    ("sampling", "support"),
    [
        (Sampling(1.0, 0, 1.0), (0, 1, 2, 3, 4, 5)),
        (Sampling(0.5, 0, 1.0), (0, 1, 2, 3, 4, 5)),
        (Sampling(2.0, 0, 1.0), (0, 1, 2, 3, 4, 5)),
        (Sampling(1.0, 3, 1.0), (1, 3, 4)),
        (Sampling(1.0, 100, 1.0), (0, 1, 2, 3, 4, 5)),
        # 0.4 + 0.25 is short of 0.7, so the token that reaches it stays.
        (Sampling(1.0, 0, 0.7), (1, 3, 4)),
        (Sampling(1.0, 0, 0.64), (1, 3)),
        (Sampling(1.0, 0, 0.01), (1,)),
        # Of the three that top-k keeps, the two likeliest hold 0.65 / 0.8.
        (Sampling(1.0, 3, 0.8), (1, 3)),
        # At least 0.3 of 0.4; at temperature 2 the ratios are roots, and the fourth's is above 0.5.
        (Sampling(1.0, min_p=0.3), (1, 3, 4)),
        (Sampling(2.0, min_p=0.55), (1, 3, 4)),
        (Sampling(1.0, min_p=1.0), (1,)),
        (Sampling(1.0, 2, min_p=0.1), (1, 3)),
    ],
)
def test_distribution(sampling: Sampling, support: tuple[int, ...]) -> None:
    """Support exactly, frequencies by Pearson's test at p = 0.001 (critical value of 5 degrees of freedom)."""
    weights = np.zeros_like(PROBABILITIES)
    weights[list(support)] = PROBABILITIES[list(support)] ** (1 / sampling.temperature)
    counts = draw(sampling)
    assert set(np.flatnonzero(counts)) == set(support)
    assert chi_squared(counts, weights) < 20.5
    if len(support) > 1:
        assert chi_squared(counts, np.where(weights > 0, 1.0, 0.0)) > 20.5, "the test must see a wrong distribution"


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_greedy_takes_the_likeliest_and_the_first_of_equals(top_k: int, top_p: float) -> None:
    logits = jnp.array([0.0, 3.0, 3.0, -1e30])
    assert int(sample_logits(logits, jax.random.key(0), Sampling(0.0, top_k, top_p).arrays())) == 1


def test_noise_belongs_to_the_token_and_not_to_its_rank() -> None:
    """Two nearly equal logits that change places through rounding must not change the draw of the others."""
    first = jnp.array([1.0, 1.0 + 1e-6, 0.5, 0.2])
    second = jnp.array([1.0 + 1e-6, 1.0, 0.5, 0.2])
    keys = jax.random.split(jax.random.key(1), 500)
    a, b = (
        jax.vmap(lambda key, x=x: sample_logits(x, key, Sampling(1.0, 3, 0.99).arrays()))(keys) for x in (first, second)
    )
    np.testing.assert_array_equal(a, b)


def test_a_repetition_penalty_makes_what_was_seen_less_likely_whatever_its_sign() -> None:
    logits, seen = jnp.array([2.0, -1.0, 3.0, -2.0, 0.0]), jnp.array([True, True, False, False, True])
    kept = kept_logits(logits, Sampling(repetition_penalty=2.0).arrays(), seen)
    np.testing.assert_allclose(kept, [1.0, -2.0, 3.0, -2.0, 0.0])
    assert int(sample_logits(logits, jax.random.key(0), Sampling(0.0, repetition_penalty=2.0).arrays(), ~seen)) == 0
    np.testing.assert_array_equal(kept_logits(logits, Sampling().arrays(), seen), logits)


def test_a_sort_is_left_out_where_nothing_is_cut() -> None:
    """One program for all settings, in which the sort is in one of two branches, also side by side in a batch."""
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6)), jnp.float32)
    sampled: Any = jax.jit(lambda rows, sampling: jax.vmap(lambda row: kept_logits(row, sampling))(rows))

    def primitives(jaxpr: Any, into_branches: bool) -> set[str]:
        found = {equation.primitive.name for equation in jaxpr.eqns}
        for equation in jaxpr.eqns:
            if into_branches or equation.primitive.name != "cond":
                found |= {
                    n
                    for sub in jax.extend.core.jaxprs_in_params(equation.params)
                    for n in primitives(sub, into_branches)
                }
        return found

    jaxpr = sampled.trace(rows, Sampling().arrays()).jaxpr.jaxpr
    assert "sort" in primitives(jaxpr, True) and "sort" not in primitives(jaxpr, False)
    for sampling in (Sampling(), Sampling(top_k=2), Sampling(0.0, top_p=0.5)):
        expected = [kept_logits(row, sampling.arrays()) for row in rows]
        np.testing.assert_array_equal(sampled(rows, sampling.arrays()), np.stack(expected))
    assert sampled._cache_size() == 1

"""The distribution that tokens are drawn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.inference.sampling import sample_logits

PROBABILITIES = np.array([0.08, 0.4, 0.02, 0.25, 0.15, 0.1])


def draw(temperature: float, top_k: int, top_p: float, num_draws: int = 20_000) -> np.ndarray:
    """Returns how often each token is drawn."""
    logits = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))
    keys = jax.random.split(jax.random.key(5), num_draws)
    tokens = jax.vmap(lambda key: sample_logits(logits, key, temperature, top_k, top_p))(keys)
    return np.bincount(np.asarray(tokens), minlength=len(PROBABILITIES))


def chi_squared(counts: np.ndarray, weights: np.ndarray) -> float:
    """Pearson's statistic of the tokens with positive weight."""
    kept = weights > 0
    expected = counts.sum() * weights[kept] / weights[kept].sum()
    return float(np.sum((counts[kept] - expected) ** 2 / expected))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "support"),
    [
        (1.0, 0, 1.0, (0, 1, 2, 3, 4, 5)),
        (0.5, 0, 1.0, (0, 1, 2, 3, 4, 5)),
        (2.0, 0, 1.0, (0, 1, 2, 3, 4, 5)),
        (1.0, 3, 1.0, (1, 3, 4)),
        (1.0, 100, 1.0, (0, 1, 2, 3, 4, 5)),
        # 0.4 + 0.25 is short of 0.7, so the token that reaches it stays.
        (1.0, 0, 0.7, (1, 3, 4)),
        (1.0, 0, 0.64, (1, 3)),
        (1.0, 0, 0.01, (1,)),
        # Of the three that top-k keeps, the two likeliest hold 0.65 / 0.8.
        (1.0, 3, 0.8, (1, 3)),
    ],
)
def test_distribution(temperature: float, top_k: int, top_p: float, support: tuple[int, ...]) -> None:
    """Support exactly, frequencies by Pearson's test at p = 0.001 (critical value of 5 degrees of freedom)."""
    weights = np.zeros_like(PROBABILITIES)
    weights[list(support)] = PROBABILITIES[list(support)] ** (1 / temperature)
    counts = draw(temperature, top_k, top_p)
    assert set(np.flatnonzero(counts)) == set(support)
    assert chi_squared(counts, weights) < 20.5
    if len(support) > 1:
        assert chi_squared(counts, np.where(weights > 0, 1.0, 0.0)) > 20.5, "the test must see a wrong distribution"


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 0.9)])
def test_greedy_takes_the_likeliest_and_the_first_of_equals(top_k: int, top_p: float) -> None:
    logits = jnp.array([0.0, 3.0, 3.0, -1e30])
    assert int(sample_logits(logits, jax.random.key(0), 0.0, top_k, top_p)) == 1


def test_noise_belongs_to_the_token_and_not_to_its_rank() -> None:
    """Two nearly equal logits that change places through rounding must not change the draw of the others."""
    first = jnp.array([1.0, 1.0 + 1e-6, 0.5, 0.2])
    second = jnp.array([1.0 + 1e-6, 1.0, 0.5, 0.2])
    keys = jax.random.split(jax.random.key(1), 500)
    a, b = (jax.vmap(lambda key, x=x: sample_logits(x, key, 1.0, 3, 0.99))(keys) for x in (first, second))
    np.testing.assert_array_equal(a, b)

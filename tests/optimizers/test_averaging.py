"""Averages of weights by their definition."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import Config, replace
from transformer.models.parameters import ParameterSpec, zeros
from transformer.optimizers import evaluated, is_averaged, make_optimizer, replace_average
from transformer.optimizers.moving_average import moving_average

SPECS = {
    "kernel": ParameterSpec((2, 3), ("embed", "mlp"), zeros, "matrix"),
    "balance": ParameterSpec((3,), ("experts",), zeros, "balance"),
}


@pytest.mark.parametrize("decay", [0.5, 0.99, 0.999999])
def test_a_moving_average_weighs_every_update_by_its_age(decay):
    rng = np.random.default_rng(0)
    optimizer: Any = moving_average(decay)
    params: Any = {"kernel": jnp.full((2, 3), 1e3)}  # which the average forgets at once
    state, seen = optimizer.init(params), []
    for count in range(1, 6):
        updates = {"kernel": jnp.asarray(rng.standard_normal((2, 3)) - (1e3 if count == 1 else 0), jnp.float32)}
        passed, state = optimizer.update(updates, state, params)
        assert passed is updates
        params = optax.apply_updates(params, passed)
        seen.append(np.asarray(params["kernel"], np.float64))
        weights = decay ** np.arange(count)[::-1].astype(np.float64)
        expected = np.tensordot(weights / weights.sum(), np.stack(seen), 1)
        np.testing.assert_allclose(evaluated(params, state)["kernel"], expected, rtol=1e-4, atol=1e-4)


def parts(**optimizer: Any) -> tuple[Any, Any]:
    config = replace(Config(), optimizer={"schedule": "constant"} | optimizer, model={"balance_bias_rate": 0.1})
    params: Any = {"kernel": jnp.ones((2, 3)), "balance": jnp.zeros(3)}
    rule: Any = make_optimizer(config, SPECS)
    state = rule.init(params)
    for _ in range(3):
        updates, state = rule.update(jax.tree.map(jnp.ones_like, params), state, params, rate=jnp.float32(0.1))
        params = optax.apply_updates(params, updates)
    return params, state


def test_without_an_average_the_weights_are_evaluated_themselves():
    params, state = parts()
    assert not is_averaged(state) and evaluated(params, state) is params
    assert replace_average(state, ()) == state


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_the_average_can_be_taken_out_of_a_state_and_put_back(name):
    params, state = parts(name=name, ema_decay=0.9)
    average = evaluated(params, state)
    assert is_averaged(state) and not np.allclose(average["kernel"], params["kernel"])
    assert np.allclose(average["balance"], [-0.1 * (3 + 2 * 0.9 + 0.81) / (1 + 0.9 + 0.81)] * 3)
    without = replace_average(state, ())
    assert len(jax.tree.leaves(without)) == len(jax.tree.leaves(state)) - 2
    assert evaluated(params, replace_average(without, average)) is average


def test_a_schedule_free_average_leaves_a_routers_bias_as_it_is():
    params, state = parts(name="schedule_free")
    average = evaluated(params, state)
    assert is_averaged(state) and not np.allclose(average["kernel"], params["kernel"])
    np.testing.assert_array_equal(average["balance"], params["balance"])
    # It lags behind the weights, which lag behind the point that moves.
    assert np.all(average["kernel"] > params["kernel"])

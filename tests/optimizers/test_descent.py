"""muP: which rates follow the width, and that with them activations move as far at every width."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.config import Config, replace
from transformer.models.parameters import ParameterSpec, init_parameters, map_specs, parameter_specs, zeros
from transformer.models.transformer import Transformer, apply
from transformer.optimizers import OPTIMIZERS, make_optimizer

SPECS = {
    "kernel": ParameterSpec((2, 4, 6), ("layers", "embed", "mlp"), zeros, "matrix"),
    "embedding": ParameterSpec((5, 4), ("vocab", "embed"), zeros, "embedding"),
    "head": ParameterSpec((5, 4), ("vocab", "embed"), zeros, "head"),
    "norm": ParameterSpec((2, 4), ("layers", "norm"), zeros, "norm"),
    "bias": ParameterSpec((2, 6), ("layers", "mlp"), zeros, "bias"),
}


def moved(base_width: int, weight_decay: float, **optimizer: Any) -> Any:
    settings: Any = {"schedule": "constant", "weight_decay": weight_decay}
    model: Any = {"parametrization": "mup", "width": 512, "base_width": base_width}
    rule: Any = make_optimizer(replace(Config(), optimizer=settings | optimizer, model=model), SPECS)
    rng = np.random.default_rng(0)
    params, gradient = (map_specs(lambda spec: jnp.asarray(rng.random(spec.shape)), SPECS) for _ in range(2))
    return rule.update(gradient, rule.init(params), params, rate=jnp.float32(0.1))[0]


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
def test_only_the_rate_of_matrices_follows_the_width(name):
    """By 1/16, or by its root where the rule's own steps follow it; weight decay does not."""
    same, wide = moved(512, 0.0, name=name), moved(32, 0.0, name=name)
    factors = dict.fromkeys(SPECS, 1.0) | {"kernel": 1 / 4 if name in ("adafactor", "muon") else 1 / 16}
    for leaf, factor in factors.items():
        np.testing.assert_allclose(wide[leaf], factor * same[leaf], rtol=1e-4, err_msg=leaf)
    same_decays, decays = moved(512, 0.3, name=name), moved(32, 0.3, name=name)
    for leaf in SPECS:
        decay = same_decays[leaf] - same[leaf]
        np.testing.assert_allclose(decays[leaf] - wide[leaf], decay, rtol=1e-3, atol=1e-6, err_msg=leaf)
    assert np.all(same_decays["kernel"] < same["kernel"]) and np.all(same_decays["norm"] == same["norm"])


@functools.cache
def network(width: int, parametrization: str) -> tuple[Config, Any, Any, Any]:
    """Returns the configuration, the parameters' specs, their initial values, and the compiled gradient, with the
    final hidden states and the logits."""
    model: Any = {"width": width, "head_width": 16, "num_heads": width // 16, "base_width": 64, "initial_scale": 0.1}
    model |= {
        "norm": "none",
        "positions": "none",
        "num_layers": 1,
        "vocab_size": 128,
        "scan_layers": False,
        "attention_implementation": "reference",
    }
    config = replace(Config(), model=model | {"parametrization": parametrization})
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, 128, (2, 4, 16))
    places = np.tile(np.arange(16), (4, 1))
    batch = {"inputs": inputs, "positions": places, "segment_ids": np.ones_like(places)}
    module = Transformer(config.model)

    def loss(params: Any) -> Any:
        outputs = apply(module, params, jax.tree.map(jnp.asarray, batch))
        logits = outputs.logits(outputs.hidden)
        found = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], axis=-1)
        return -jnp.mean(found), (outputs.hidden, logits)

    begin = jax.jit(lambda: init_parameters(module, jax.random.key(0, impl="unsafe_rbg")))
    params = begin()
    return config, parameter_specs(module), params, jax.jit(jax.grad(loss, has_aux=True))


def changes(width: int, parametrization: str, name: str, rate: float) -> np.ndarray:
    """Returns how far hidden states and logits move in three steps: root mean squares."""
    config, specs, params, gradient = network(width, parametrization)
    optimizer = make_optimizer(replace(config, optimizer={"name": name, "weight_decay": 0.0}), specs)

    @jax.jit
    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params, rate=jnp.float32(rate))
        return optax.apply_updates(params, updates), state

    state = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(optimizer.init, params))
    gradients, before = gradient(params)
    after = before
    for _ in range(3):
        params, state = step(gradients, state, params)
        gradients, after = gradient(params)
    return np.array([np.sqrt(np.mean(np.square(b - a))) for a, b in zip(before, after, strict=True)])


def slopes(widths: tuple[int, ...], *rest: Any) -> np.ndarray:
    """Returns with which powers of the width the changes grow."""
    return np.polyfit(np.log(widths), np.log([changes(width, *rest) for width in widths]), 1)[0]


@pytest.mark.slow
def test_activations_move_as_far_at_every_width():
    """The coordinate check of Yang et al. 2022, appendix D.1. Logits, which begin at zero in the limit, come down to theirs."""
    hidden, logits = slopes((64, 128, 512), "mup", "adamw", 5e-4)
    assert abs(hidden) < 0.1 and -0.4 < logits < 0.1
    hidden, logits = slopes((64, 512), "standard", "adamw", 5e-4)
    assert hidden > 1 and logits > 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("adafactor", 4e-3), ("muon", 2e-3)])
def test_rules_that_follow_the_root_of_the_width_too(name, rate):
    hidden, logits = slopes((64, 512), "mup", name, rate)
    assert abs(hidden) < 0.1 and -0.4 < logits < 0.1

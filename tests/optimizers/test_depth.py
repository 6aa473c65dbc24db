"""Learning rates by depth."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.checkpointing.transfer import flat
from transformer.config import replace
from transformer.models.parameters import parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import OPTIMIZERS, make_optimizer
from transformer.optimizers.depth import depth_factors


def test_factors_fall_from_the_top(tiny_config: Any) -> None:
    """By the place of a layer, also in a pattern's period, of which layers of one kind are stacked."""
    model = {"num_layers": 4, "layers": "attention+attention.window", "positions": "learned", "tied_embeddings": False}
    config = tiny_config(model=model, optimizer={"depth_rate": 0.5})
    found = flat(depth_factors(config, parameter_specs(Transformer(config.model))))
    assert found["embedding"] == found["positions"] == 0.5**4
    assert found["head"] == found["decoder/final_norm/scale"] == 1
    kernel = "decoder/layers/blocks/{}/mixer/query/kernel"
    assert found[kernel.format(0)].shape == (2, 1, 1, 1)[: found[kernel.format(0)].ndim]
    assert found[kernel.format(0)].ravel().tolist() == [1 / 8, 1 / 2]
    assert found[kernel.format(1)].ravel().tolist() == [1 / 4, 1]

    both = {"architecture": "encoder_decoder", "num_layers": 2, "num_encoder_layers": 3, "positions": "relative"}
    config = tiny_config(model=both, optimizer={"depth_rate": 0.5})
    found = flat(depth_factors(config, parameter_specs(Transformer(config.model))))
    assert found["embedding"] == 1 / 8
    assert found["encoder/layers/mixer/key/kernel"].ravel().tolist() == [1 / 4, 1 / 2, 1]
    assert found["decoder/layers/cross/key/kernel"].ravel().tolist() == [1 / 2, 1]
    biases = {name: factor for name, factor in found.items() if "bias" in name}
    assert sorted(biases.values()) == [1 / 8, 1 / 4]


@pytest.mark.parametrize(
    "name", [name if name in ("adamw", "muon") else pytest.param(name, marks=pytest.mark.slow) for name in OPTIMIZERS]
)
def test_updates_are_multiplied_by_them(tiny_config: Any, name: str) -> None:
    """Whatever the rule, weight decay included, and beside what is frozen."""
    frozen = ("decoder/final_norm/*",)
    config = tiny_config(model={"width": 8}, optimizer={"name": name, "clip_norm": 0.0, "frozen": frozen})
    specs = parameter_specs(Transformer(config.model))
    rng = np.random.default_rng(0)
    params, gradients = (
        jax.tree.map(lambda spec: jnp.asarray(rng.standard_normal(spec.shape), jnp.float32), specs) for _ in range(2)
    )

    def updates(rate: float) -> Any:
        rule = make_optimizer(replace(config, optimizer={"depth_rate": rate}), specs)
        return rule.update(gradients, rule.init(params), params, rate=np.float32(0.1))[0]

    plain, by_depth = flat(updates(1.0)), flat(updates(0.5))
    factors = flat(depth_factors(replace(config, optimizer={"depth_rate": 0.5}), specs))
    for path, values in plain.items():
        np.testing.assert_allclose(by_depth[path], factors[path] * values, rtol=2e-5, atol=1e-7)

"""Layers before the first period, and what else may differ from layer to layer: behind a cache, in a loop, on a mesh, counted."""

import contextlib
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig, replace
from transformer.models.flops import forward_flops
from transformer.models.parameters import init_parameters, num_parameters, parameter_specs
from transformer.models.transformer import Transformer, apply, empty_cache
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.state import TrainState, state_shardings
from transformer.training.step import make_train_step

OPTIONS = {
    "num_layers": 3,
    "first_layers": "attention.window",
    "layers": "attention@none/experts",
    "window": 4,
    "window_rotary_base": 30.0,
    "width": 32,
    "num_kv_heads": 2,
    "qk_norm": True,
    "qk_norm_over": "projection",
    "attention_biases": "qkv",
    "norm": "rmsnorm",
    "norm_placement": "output",
    "num_experts": 4,
    "expert_width": 8,
    "num_expert_groups": 2,
    "router_score": "sigmoid",
    "normalize_expert_weights": False,
    "expert_scale": 1.5,
    "attention_implementation": "reference",
}


def test_a_cache_gives_what_a_pass_over_the_text_gives(tiny_config: Any) -> None:
    """Three tokens at once, then one by one, through a ring that is full soon and layers that keep all; and the pass in a
    loop over layers, which are unrolled behind the cache."""
    model, looped = (Transformer(tiny_config(model=OPTIONS | {"scan_layers": scan}).model) for scan in (False, True))
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    tokens = np.random.default_rng(0).integers(4, 203, (2, 9), dtype=np.int32)
    positions = np.tile(np.arange(9, dtype=np.int32), (2, 1))
    batch = {"inputs": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}

    @partial(jax.jit, static_argnums=0)
    def run(model: Transformer, batch: Any, cache: Any) -> Any:
        outputs = apply(model, params, batch, cache=cache)
        return outputs.logits(outputs.hidden)[..., : model.config.vocab_size], outputs.cache

    expected = np.asarray(run(looped, batch, None)[0])
    cache, found = empty_cache(model, 2, 9), []
    assert cache["layers"]["first"]["mixer"]["key"].shape == (1, 2, 2, 4, 8)
    assert cache["layers"]["rest"]["mixer"]["key"].shape == (2, 2, 2, 9, 8)
    for start, stop in ((0, 3), *((t, t + 1) for t in range(3, 9))):
        logits, cache = run(model, {name: value[:, start:stop] for name, value in batch.items()}, cache)
        found.append(logits)
    actual = np.concatenate(found, axis=1)
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)


@pytest.mark.slow
def test_a_mesh_changes_no_step(tiny_config: Any, tiny_batch: Any) -> None:
    """The gradient, as SGD's step, on one device; and split by heads, by experts and over rows."""
    plain = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
    base, batch = tiny_config(model=OPTIONS | {"scan_layers": True}, optimizer=plain), tiny_batch(tiny_config())
    found = []
    for config in (base, replace(base, parallel={"fsdp": 2, "expert": 2, "tensor": 2})):
        mesh = make_mesh(config) if config is not base else None
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            model = Transformer(config.model)
            optimizer = make_optimizer(config, parameter_specs(model))
            params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
            state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
            layout = None if mesh is None else state_shardings(model, optimizer, mesh)
            state = state if mesh is None else jax.device_put(state, layout)
            after, metrics = jax.jit(make_train_step(config, model, optimizer, layout))(state, batch)
        update = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.params, params)
        found.append((update, float(metrics["loss"])))
    (expected, loss), (actual, other) = found
    assert other == pytest.approx(loss, rel=1e-6)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        name = jax.tree_util.keystr(path)
        if "['key']['bias']" not in name or "norm" in name:
            assert np.linalg.norm(leaf - like) <= 2e-5 * np.linalg.norm(like), name


def test_they_cost_what_the_same_layers_cost_written_out() -> None:
    config = ModelConfig(vocab_size=64, scan_layers=False, width=16, num_heads=2, num_layers=7, num_experts=4)
    kinds = "2*attention.window", "attention/none+attention/experts", "attention.window/experts"
    short = dataclasses.replace(
        config, first_layers=kinds[0], layers="attention+attention.window@none/experts", num_layers=6
    )
    written = dataclasses.replace(config, layers=f"{kinds[0]}+2*attention+2*attention.window/experts", num_layers=6)
    assert forward_flops(short, 50) == forward_flops(written, 50)
    assert num_parameters(Transformer(short)) == num_parameters(Transformer(written))
    assert short.num_periods == 2

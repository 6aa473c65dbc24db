"""Parameters: counts, padding rows, initial values, and what derives from one declaration."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hybrid_1b
from transformer.config import ModelConfig, replace
from transformer.models.parameters import (
    abstract_parameters,
    bind,
    init_parameters,
    is_spec,
    num_parameters,
    parameter_specs,
)
from transformer.models.transformer import Transformer

GPT2 = ModelConfig(
    vocab_size=50_257,
    num_layers=12,
    width=768,
    num_heads=12,
    biases=True,
    positions="learned",
    num_positions=1024,
    scan_layers=True,
)
SMALL = ModelConfig(vocab_size=203, num_layers=3, width=32, num_heads=4, scan_layers=True)


def leaves(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 124_439_808),
        ({"biases": False}, 124_337_664),
        ({"tied_embeddings": False}, 124_439_808 + 50_257 * 768),
        ({"positions": "rotary"}, 124_439_808 - 1024 * 768),
        # Radford et al. 2019, the largest: 1,557,611,200.
        ({"num_layers": 48, "width": 1600, "num_heads": 25}, 1_557_611_200),
    ],
    ids=["gpt2", "no biases", "free head", "rotary", "gpt2-xl"],
)
def test_counts_are_the_published_ones(changes, count):
    assert num_parameters(Transformer(dataclasses.replace(GPT2, **changes))) == count


def test_count_of_grouped_gated_model_by_hand():
    config = dataclasses.replace(SMALL, num_kv_heads=2, activation="swiglu", norm="rmsnorm", norm_placement="post")
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert config.ff_width == 128
    assert num_parameters(Transformer(config)) == 203 * 32 + 3 * (attention + 3 * 32 * 128 + 2 * 32)


def test_count_of_the_hybrid_recipe_by_hand():
    config = replace(hybrid_1b.get_config(), model={"scan_layers": True}).model
    width, heads, feedforward = 2048, 16, 3 * 2048 * 5504
    delta = 5 * width**2 + 3 * 4 * width + 2 * heads * width + 2 * heads + width // heads
    layers = 16 * (feedforward + 2 * width) + 12 * delta + 4 * 4 * width**2
    count = 50_257 * width + width + layers
    assert num_parameters(Transformer(config)) == count == 963_909_504
    held = jax.eval_shape(lambda: init_parameters(Transformer(config), jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(held)) == count + (50_304 - 50_257) * width
    assert f"{count:,}" in str(hybrid_1b.__doc__)


def test_padding_rows_are_zero_and_not_counted():
    model = Transformer(dataclasses.replace(SMALL, tied_embeddings=False))
    params = init_parameters(model, jax.random.key(0))
    for name in ("embedding", "head"):
        assert params[name].shape == (256, 32)
        assert np.all(params[name][203:] == 0)
        assert np.all(np.any(params[name][:203] != 0, axis=1))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == num_parameters(model) + 2 * 53 * 32


def test_abstract_parameters_are_those_of_the_initial_ones():
    model = Transformer(dataclasses.replace(SMALL, biases=True, positions="learned", num_positions=8))
    initial = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    assert leaves(abstract_parameters(model)) == leaves(initial)
    specs = jax.tree.leaves(parameter_specs(model), is_leaf=is_spec)
    assert [len(spec.axes) for spec in specs] == [leaf.ndim for leaf in jax.tree.leaves(initial)]
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype(jnp.float32)}


def test_initial_values_do_not_depend_on_other_parameters():
    few = leaves(init_parameters(Transformer(SMALL), jax.random.key(7)))
    richer = dataclasses.replace(
        SMALL, biases=True, activation="geglu", feedforward_width=128, positions="learned", num_positions=4
    )
    many = leaves(init_parameters(Transformer(richer), jax.random.key(7)))
    assert set(few) < set(many)
    for name, value in few.items():
        np.testing.assert_array_equal(value, many[name], err_msg=name)


def test_every_array_and_layer_has_values_of_its_own():
    params = init_parameters(Transformer(SMALL), jax.random.key(0))
    attention = params["decoder"]["layers"]["mixer"]
    matrices = [np.array(attention[name]["kernel"][layer]) for name in ("query", "key", "value") for layer in range(3)]
    for number, one in enumerate(matrices):
        for other in matrices[:number]:
            assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.15
    other_seed = init_parameters(Transformer(SMALL), jax.random.key(1))
    assert not np.any(other_seed["embedding"][:203] == params["embedding"][:203])


def test_scale_of_initial_values():
    params = init_parameters(Transformer(dataclasses.replace(SMALL, width=128)), jax.random.key(0))
    layers, scale = params["decoder"]["layers"], SMALL.initial_scale
    residual = scale / np.sqrt(2 * SMALL.num_layers)
    for value, expected in [
        (params["embedding"][:203], scale),
        (layers["mixer"]["query"]["kernel"], scale),
        (layers["feedforward"]["up"]["kernel"], scale),
        (layers["mixer"]["output"]["kernel"], residual),
        (layers["feedforward"]["down"]["kernel"], residual),
    ]:
        assert np.std(value) == pytest.approx(expected, rel=0.03)
        assert abs(np.mean(value)) < expected / 20
    assert np.all(layers["mixer_norm"]["scale"] == 1)


def test_binding_copies_and_leaves_the_module_as_it_was():
    model = Transformer(SMALL)
    before = parameter_specs(model)
    params = init_parameters(model, jax.random.key(0))
    bound = bind(model, params)
    assert parameter_specs(model) == before
    for name, value in leaves(parameter_specs(bound)).items():
        assert value is leaves(params)[name]

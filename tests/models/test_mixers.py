"""Mixers with a state: each against its equations in double precision, in every form."""

import dataclasses
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixer_references import REFERENCES
from recurrences import assert_close

from transformer.config import LayerKind, ModelConfig
from transformer.models.masks import Tokens
from transformer.models.mixers import Context, make_mixer
from transformer.models.parameters import abstract_parameters, bind, init_parameters
from transformer.models.performer import projections
from transformer.models.rotary import rotary_angles

CONFIG = ModelConfig(
    vocab_size=50,
    width=8,
    num_heads=2,
    num_kv_heads=1,
    head_width=6,
    state_width=4,
    num_features=7,
    biases=True,
    initial_scale=0.5,
)
FORMS = ("chunkwise", "parallel", "recurrent")


def packed(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments and positions: one text; several, the last with padding within; and padding alone before a token."""
    rng = np.random.default_rng(length)
    segments = np.ones((3, length), np.int32)
    segments[1] = np.where(rng.random(length) < 0.3, 0, 1 + np.arange(length) // 60)
    segments[1, : length // 3] = 1 + np.cumsum(rng.random(length // 3) < 0.3)
    segments[1, length // 3 :][segments[1, length // 3 :] > 0] += 100
    segments[2, :-1] = 0
    positions = np.zeros_like(segments)
    for row, segment in np.ndindex(3, 200):
        own = segments[row] == segment
        positions[row, own] = np.arange(own.sum())
    return segments, positions


def context_of(config: ModelConfig, segments: Any, positions: Any) -> Context:
    tokens = Tokens(positions, segments)
    return Context(tokens, tokens, rotary=rotary_angles(positions, config, config.head_dim))


@cache
def parameters(name: str) -> Any:
    """None of them is 0 or 1."""
    params = init_parameters(make_mixer(CONFIG, LayerKind(name), 2), jax.random.key(0))
    return jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)


def inputs(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((3, length, CONFIG.width)).astype(np.float32)


def differentiated(name: str, form: str, length: int) -> Any:
    """The compiled function of parameters, inputs and the output's gradient to output and gradients."""
    config = dataclasses.replace(CONFIG, recurrence_form=form)
    mixer = make_mixer(config, LayerKind(name), 2)
    segments, positions = (jnp.asarray(values) for values in packed(length))

    def run(params: Any, x: Any, ahead: Any) -> Any:
        def output(params: Any, x: Any) -> Any:
            return bind(mixer, params)(x, context_of(config, segments, positions), None, 0)[0]

        y, backward = jax.vjp(output, params, x)
        return y, backward(jnp.where((segments != 0)[:, :, None], ahead, 0))

    shape = jax.ShapeDtypeStruct((3, length, CONFIG.width), jnp.float32)
    return jax.jit(run).lower(abstract_parameters(mixer), shape, shape)


def expected_output(name: str, x: np.ndarray) -> np.ndarray:
    """Each segment's tokens by themselves, through the reference."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), parameters(name))
    output, segments = np.zeros(x.shape), packed(x.shape[1])[0]
    for row in range(len(x)):
        for segment in set(segments[row].tolist()) - {0}:
            at = np.flatnonzero(segments[row] == segment)
            output[row, at] = REFERENCES[name](CONFIG, params, x[row, at].astype(np.float64))
    return output


LENGTHS = (1, 7, 64, 200)
"""Chunks are 64 long."""
DECAYS = {
    "gated_linear_attention": {"decay_down/kernel", "decay_up/bias", "decay_up/kernel"},
    "gated_delta_net": {"decay/bias", "decay/log_rate", "decay/project/kernel"},
    "mamba2": {"decay/log_rate"},
}
"""What a single token, with nothing to forget, has no use for; Mamba-2's step multiplies its value too."""


# All lengths of the simplest mixer, for all others the one that is no multiple of a chunk.
CASES = [
    pytest.param(name, length, marks=() if name == "linear_attention" or length == LENGTHS[-1] else pytest.mark.slow)
    for name in REFERENCES
    for length in LENGTHS
]


@pytest.mark.parametrize(("name", "length"), CASES)
def test_three_forms_are_the_equations_and_have_one_gradient(name, length):
    """Packed segments, and padding anywhere: no token sees another segment, and padding changes nothing."""
    x, ahead = inputs(length), np.cos(np.arange(3 * length * 8, dtype=np.float32)).reshape(3, length, 8)
    real = packed(length)[0] != 0
    expected, gradients, programs = expected_output(name, x)[real], None, set()
    for form in FORMS:
        lowered = differentiated(name, form, length)
        programs.add(len(lowered.as_text()))
        run = lowered.compile()
        output, (of_parameters, of_x) = jax.tree.map(np.asarray, run(parameters(name), x, ahead))
        assert_close(output[real], expected)
        assert np.all(of_x[~real] == 0)
        gradients = (of_parameters, of_x) if gradients is None else gradients
        without = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, gradient in jax.tree.leaves_with_path(of_parameters)
            if not np.linalg.norm(gradient) > 0
        }
        assert without == (DECAYS.get(name, set()) if length == 1 else set())
        assert_close((of_parameters, of_x), gradients, 1e-4)
        for scale in (1e4, 1e-30, 0.0):
            assert all(np.all(np.isfinite(y)) for y in jax.tree.leaves(run(parameters(name), scale * x, ahead)))
    assert len(programs) == (3 if length > 64 else 2 if length > 1 else 1)


@pytest.mark.parametrize("name", REFERENCES)
def test_type_is_the_streams_and_what_is_remembered_does_not_grow(name):
    mixer = make_mixer(CONFIG, LayerKind(name), 2)
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.bfloat16)
    places = jnp.ones((2, 5), jnp.int32)
    output = jax.eval_shape(lambda x: bind(mixer, parameters(name))(x, context_of(CONFIG, places, places), None, 0), x)
    assert output[0].dtype == jnp.bfloat16 and output[0].shape == x.shape
    short, long = mixer.cache_specs(2, 10), mixer.cache_specs(2, 10_000)
    assert short == long
    rows, columns = (7, 7) if name == "performer" else (4, 7 if name == "linear_attention" else 6)
    assert short["state"].shape == (2, 2, rows, columns) and short["state"].dtype == jnp.float32


def test_features_are_orthogonal_and_estimate_the_softmax():
    directions = projections(2, 6, 4).astype(np.float64)
    for rows in (directions[:, :4], directions[:, 4:]):
        products = rows @ np.swapaxes(rows, -1, -2)
        assert np.all(np.abs(products - products * np.eye(rows.shape[1])) < 1e-5)
    norms = np.sum(projections(1, 40_000, 4).astype(np.float64) ** 2, axis=-1)
    assert np.mean(norms) == pytest.approx(4, rel=0.03) and np.var(norms) == pytest.approx(8, rel=0.1)  # chi squared
    # E[phi(x) phi(y)] = exp(x y).
    x, y = np.random.default_rng(0).standard_normal((2, 4)) / 2
    features = [np.exp(projections(1, 40_000, 4)[0] @ z - z @ z / 2) for z in (x, y)]
    assert np.mean(features[0] * features[1]) == pytest.approx(math.exp(x @ y), rel=0.02)

"""Memory of compiled programs, which are not run."""

import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest

from transformer.config import LayerKind, ModelConfig
from transformer.config.model import LinearMixer
from transformer.models.masks import Tokens
from transformer.models.mixers import Context, make_mixer
from transformer.models.parameters import abstract_parameters, bind


def temporary_bytes(name: str, length: int) -> int:
    """Of one layer's output and gradient."""
    config = ModelConfig(width=16, num_heads=2, num_features=8)
    mixer = make_mixer(config, LayerKind(name), 1)

    def total(params: Any, x: Any, segments: Any) -> Any:
        tokens = Tokens(segments, segments)
        return jnp.sum(bind(mixer, params)(x, Context(tokens, tokens), None, 0)[0])

    x, segments = jax.ShapeDtypeStruct((1, length, 16), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    compiled: Any = step.lower(abstract_parameters(mixer), x, segments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


QUICK = ("linear_attention", "gated_delta_net")
MIXERS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in get_args(LinearMixer)]


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_needs_memory_in_proportion_to_the_length(name):
    short, long = temporary_bytes(name, 1024), temporary_bytes(name, 16_384)
    slope = math.log(long / short) / math.log(16)
    assert 0.98 < slope < 1.02, (short, long, slope)

"""A step for each token and head, and the decay over it: what `mamba2` and `gated_delta_net` forget."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.layers import Linear
from transformer.models.parameters import parameter

RATES, STEPS = (1.0, 16.0), (1e-3, 1e-1)
"""Ranges from which rates and, on a logarithmic scale, steps are drawn at first."""


class HeadDecay(nnx.Module):
    """step = softplus(x W + b), log-decay = -rate * step, of one number a head (Dao & Gu 2024, arXiv:2405.21060)."""

    def __init__(self, config: ModelConfig):
        heads = (config.num_heads,)
        self.project = Linear(config, (config.width, *heads), ("embed", "heads"), bias=False)
        self.log_rate = parameter(heads, ("heads",), _log_rate, "vector")
        self.bias = parameter(heads, ("heads",), _step_bias, "bias")

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T N"], Float[Array, "B T N"]]:
        """Returns steps and log-decays, in float32."""
        step = jax.nn.softplus(self.project(x).astype(jnp.float32) + self.bias[...])
        return step, -jnp.exp(self.log_rate[...]) * step


def _log_rate(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, *RATES))


def _step_bias(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    step = jnp.exp(jax.random.uniform(key, shape, jnp.float32, *map(math.log, STEPS)))
    return jnp.log(jnp.expm1(step))  # softplus gives the step back

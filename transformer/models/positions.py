"""How a model is told the order of tokens: on the embedding (`rotary` and `biases` have the other ways)."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Angles = tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]
"""Cosine and sine of each position's angle in each of R planes."""


def sinusoidal_positions(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Returns the sines and cosines of Vaswani et al. (2017), section 3.5: sines first, then cosines."""
    frequencies = jnp.exp(jnp.arange(width // 2) * (-math.log(10_000.0) / (width // 2)))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

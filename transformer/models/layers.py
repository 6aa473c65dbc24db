"""The pieces of a block: linear maps, norms, dropout and positions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.config import ModelConfig
from transformer.models.parameters import normal, ones, parameter, zeros


class Linear(nnx.Module):
    """y = x W + b, with W cast to the type of x."""

    def __init__(self, config: ModelConfig, dims: tuple[int, int], axes: tuple[str, str], scale: float | None = None):
        self.kernel = parameter(dims, axes, normal(config.initial_scale if scale is None else scale), "matrix")
        bias_axis = "norm" if axes[1] == "embed" else axes[1]
        self.bias = parameter(dims[1:], (bias_axis,), zeros, "bias") if config.biases else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = (as_rows(x) @ self.kernel[...].astype(x.dtype)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def as_rows(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns `x` as one matrix with a token a row, on a single device.

    XLA's CPU backend transposes both operands of a weight's gradient if it has to contract two dimensions. A mesh may
    split both of them, and then they stay apart.
    """
    return x.reshape(-1, x.shape[-1]) if jax.sharding.get_abstract_mesh().size <= 1 else x


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), in float32."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.scale = parameter((config.width,), ("norm",), ones, "norm")
        biased = config.biases and config.norm == "layernorm"
        self.bias = parameter((config.width,), ("norm",), zeros, "bias") if biased else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        y = x.astype(jnp.float32)
        if self.config.norm == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.config.norm_epsilon)
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)


def dropout(x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None) -> Float[Array, "..."]:
    """Zeroes a share `rate` of `x` and scales the rest by 1 / (1 - rate); without a key does nothing."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def sinusoidal_positions(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Returns the sines and cosines of Vaswani et al. (2017), section 3.5: sines first, then cosines."""
    frequencies = jnp.exp(jnp.arange(width // 2) * (-math.log(10_000.0) / (width // 2)))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotary_angles(
    positions: Int[Array, "B T"], head_width: int, base: float
) -> tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]:
    """Returns cosine and sine of each position's angle in each of R = H / 2 planes (Su et al. 2021, arXiv:2104.09864)."""
    frequencies = base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]
) -> Float[Array, "B T N H"]:
    """Turns the plane (i, i + H/2) of every head by its position's angle."""
    cosine, sine = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)


@jax.custom_vjp
def materialize(x: Array) -> Array:
    """Returns `x`, and on CPU has it, and its gradient, written to memory once.

    XLA's CPU backend otherwise repeats elementwise work such as GELU's tanh in every matrix product that reads
    it, in one of them against the grain of memory. Other backends fuse such work into the products, and are left to.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


materialize.defvjp(lambda x: (materialize(x), None), lambda _, gradient: (materialize(gradient),))

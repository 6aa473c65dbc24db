"""The pieces of a block: linear maps, norms and dropout."""

import importlib
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from transformer.config import ModelConfig
from transformer.models.parameters import Role, normal, ones, parameter, zeros


def hidden_std(config: ModelConfig) -> float:
    """Returns the standard deviation of initial weights of maps from the width; muP makes it fall with its root."""
    return config.initial_scale / math.sqrt(config.width_ratio)


def residual_std(config: ModelConfig, num_layers: int) -> float:
    """Returns the same for weights that write to the residual stream (Radford et al. 2019, section 2.3)."""
    return hidden_std(config) / (math.sqrt(2 * num_layers) if config.depth_scaled_init else 1)


class Linear(nnx.Module):
    """y = x W + b, with W cast to the type of x."""

    def __init__(
        self,
        config: ModelConfig,
        dims: tuple[int, int],
        axes: tuple[str, str],
        std: float | None = None,
        role: Role = "matrix",
        bias: bool | None = None,
    ):
        self.kernel = parameter(dims, axes, normal(hidden_std(config) if std is None else std), role)
        bias_axis = "norm" if axes[1] == "embed" else axes[1]
        biased = config.biases if bias is None else bias
        self.bias = parameter(dims[1:], (bias_axis,), zeros, "bias") if biased else None
        self.product = config.matrix_products if role == "matrix" else "compute_dtype"

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        y = self.map(as_rows(x)).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def map(self, rows: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Returns the product with the matrix."""
        kernel = self.kernel[...].astype(rows.dtype)
        if self.product == "compute_dtype":
            return rows @ kernel
        # Loaded only by models that ask for it.
        return importlib.import_module("transformer.models.eight_bits").eight_bit_product(rows, kernel, self.product)


def as_rows(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Returns `x` as one matrix with a token a row, on a single device.

    XLA's CPU backend transposes both operands of a weight's gradient if it has to contract two dimensions. A mesh may
    split both of them, and then they stay apart.
    """
    return x.reshape(-1, x.shape[-1]) if jax.sharding.get_abstract_mesh().size <= 1 else x


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016, arXiv:1607.06450) or RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), in float32; or
    nothing. Over the last dimension, which is the model's width unless told otherwise."""

    def __init__(self, config: ModelConfig, width: int | None = None):
        self.config = config
        dims, exists = (config.width if width is None else width,), config.norm != "none"
        self.scale = parameter(dims, ("norm",), ones, "norm") if exists else None
        biased = config.biases and config.norm == "layernorm"
        self.bias = parameter(dims, ("norm",), zeros, "bias") if biased else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        if self.scale is None:
            return x
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


@jax.custom_vjp
def materialize(x: Array) -> Array:
    """Returns `x`, and on CPU has it, and its gradient, written to memory once.

    XLA's CPU backend otherwise repeats elementwise work such as GELU's tanh in every matrix product that reads
    it, in one of them against the grain of memory. Other backends fuse such work into the products, and are left to.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


materialize.defvjp(lambda x: (materialize(x), None), lambda _, gradient: (materialize(gradient),))


@jax.custom_vjp
def materialize_gradient(x: Array) -> Array:
    """Returns `x`, and on CPU has its gradient written to memory: XLA would merge a transposition into the product before
    it, which then takes several times as long."""
    return x


materialize_gradient.defvjp(lambda x: (x, None), lambda _, gradient: (materialize(gradient),))

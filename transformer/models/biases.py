"""Positions as a bias on the products of queries and keys."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig
from transformer.models.mixers import Bias
from transformer.models.parameters import normal, parameter


@dataclass(frozen=True)
class Alibi:
    """Each head subtracts the distance times a slope of its own (Press et al. 2022, arXiv:2108.12409); a pytree."""

    slopes: Float[Array, "N"]

    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        distance = jnp.abs(query[:, :, None] - key[:, None, :]).astype(jnp.float32)
        return -self.slopes[:, None, None] * distance[:, None]


@dataclass(frozen=True)
class RelativeBuckets:
    """A learned number for each head and bucket of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    table: Float[Array, "R N"]
    causal: bool
    max_distance: int

    def buckets(self, offset: Int[Array, "B T S"]) -> Int[Array, "B T S"]:
        """Returns the bucket of key position minus query position: half of them exact, the others logarithmic."""
        count = self.table.shape[0]
        first = jnp.zeros_like(offset)
        if self.causal:
            distance = jnp.maximum(-offset, 0)
        else:
            count //= 2
            first = jnp.where(offset > 0, count, 0)
            distance = jnp.abs(offset)
        exact = count // 2
        # At least 1 inside the logarithm, whose value below `exact` is not used.
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
        return first + jnp.where(distance < exact, distance, far)

    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        values = self.table[self.buckets(key[:, None, :] - query[:, :, None])]
        return jnp.moveaxis(values, -1, 1)


jax.tree_util.register_dataclass(Alibi, ["slopes"], [])
jax.tree_util.register_dataclass(RelativeBuckets, ["table"], ["causal", "max_distance"])


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "N"]:
    """Returns the slopes of Press et al.: a geometric series that ends at 2^-8; between powers of two, the odd ones of the
    next power's follow."""

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 2 ** math.floor(math.log2(num_heads))
    return np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]]).astype(np.float32)


class PositionBias(nnx.Module):
    """The bias of every layer of one stack: fixed slopes, or a table that all of them share."""

    def __init__(self, config: ModelConfig, causal: bool):
        self.config, self.causal = config, causal
        dims, axes = (config.num_relative_buckets, config.num_heads), ("buckets", "heads")
        has_table = config.positions == "relative"
        self.table = parameter(dims, axes, normal(config.initial_scale), "bias") if has_table else None

    def __call__(self) -> Bias:
        """Returns the function from positions to what is added."""
        if self.table is None:
            return Alibi(jnp.asarray(alibi_slopes(self.config.num_heads)))
        return RelativeBuckets(self.table[...], self.causal, self.config.max_relative_distance)

"""Queries, keys and values of the mixers that keep a state, and the norm and gate of what they read from it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.attention import split_heads
from transformer.models.cache import CacheSpec
from transformer.models.layers import Linear, residual_std
from transformer.models.parameters import ones, parameter
from transformer.models.state_cache import state_specs


class LinearHeads(nnx.Module):
    """Heads whose keys and queries are `state_width` wide, and whose values are `head_width`.

    As in attention, keys and values have `num_kv_heads` heads; here each is repeated for the query heads that share it,
    which have states of their own.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        width, keys = config.width, config.kv_heads * config.state_dim
        self.query = Linear(config, (width, config.num_heads * config.state_dim), ("embed", "heads"))
        self.key = Linear(config, (width, keys), ("embed", "kv_heads"))
        self.value = Linear(config, (width, config.kv_heads * config.head_dim), ("embed", "kv_heads"))

    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N P"]]:
        return make_heads(self.config, self.query(x), self.key(x), self.value(x))


def make_heads(
    config: ModelConfig, query: Float[Array, "B T E"], key: Float[Array, "B T F"], value: Float[Array, "B T G"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N P"]]:
    """Returns as many heads of keys and values as of queries."""
    heads, shared = config.num_heads, config.kv_heads
    key, value = (repeat_heads(split_heads(y, shared, "kv_heads"), heads) for y in (key, value))
    return split_heads(query, heads, "heads"), key, value


def repeat_heads(x: Float[Array, "B T K H"], count: int) -> Float[Array, "B T N H"]:
    """Returns `count` heads: each of K so often that neighbours share it."""
    return x if x.shape[2] == count else jnp.repeat(x, count // x.shape[2], axis=2)


class GatedNorm(nnx.Module):
    """Norm over the last dimension, in float32, times silu(gate).

    RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467), or, `centered`, the group norm of Wu & He 2018 (arXiv:1803.08494) if
    the last dimension is a group.
    """

    def __init__(self, config: ModelConfig, width: int, centered: bool = False):
        self.epsilon, self.centered = config.norm_epsilon, centered
        self.scale = parameter((width,), ("norm",), ones, "norm")

    def __call__(self, x: Float[Array, "... P"], gate: Float[Array, "... P"]) -> Float[Array, "... P"]:
        return (self.normalize(x) * jax.nn.silu(gate.astype(jnp.float32))).astype(gate.dtype)

    def normalize(self, x: Float[Array, "... P"]) -> Float[Array, "... P"]:
        """Returns the norm alone, in float32."""
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True) if self.centered else x
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return x * self.scale[...]


class GatedHeads(nnx.Module):
    """Base of mixers whose heads each read a state; a norm, a gate and a projection follow."""

    def __init__(self, config: ModelConfig, num_layers: int, centered: bool = False):
        self.config = config
        wide = config.num_heads * config.head_dim
        self.gate = Linear(config, (config.width, wide), ("embed", "heads"))
        self.norm = GatedNorm(config, config.head_dim, centered)
        self.output = Linear(config, (wide, config.width), ("heads", "embed"), residual_std(config, num_layers))

    def gated(self, found: Float[Array, "B T N P"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns what the layer gives out for what its heads read."""
        found = self.norm(found, split_heads(self.gate(x), self.config.num_heads, "heads"))
        return self.output(found.reshape(*x.shape[:2], -1))

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        return state_specs(self.config, batch_size, self.config.state_dim, self.config.head_dim)

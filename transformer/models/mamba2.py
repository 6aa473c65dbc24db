"""Mamba-2: a state space model with one decay a head, which is linear attention too (Dao & Gu 2024, arXiv:2405.21060)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.attention import split_heads
from transformer.models.cache import Cache, CacheSpec
from transformer.models.head_decay import HeadDecay
from transformer.models.layers import Linear, residual_std
from transformer.models.linear_heads import GatedNorm, repeat_heads
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.parameters import ones, parameter
from transformer.models.short_convolution import ConvolvedLinear, convolve, tail_specs
from transformer.models.state_cache import remember, resume, state_specs


def num_groups(config: ModelConfig) -> int:
    """Returns how many heads keys and queries have, which the heads of values share."""
    return 1 if config.num_kv_heads is None else config.num_kv_heads


class Mamba2(nnx.Module):
    """Short convolutions, the state space recurrence, its input added with a weight, a gate and a norm (section 7).

    In the paper's letters: `value` is X, of `num_heads` heads of `head_width`; `key` is B and `query` C, `state_width`
    wide and shared by all heads, or by groups of them if `num_kv_heads` says how many. The input projection is split by
    parts, so that heads can be split over devices (section 8.1).
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        self.config = config
        width, wide = config.width, config.num_heads * config.head_dim
        shared = num_groups(config) * config.state_dim
        self.query = ConvolvedLinear(config, shared, "kv_heads")
        self.key = ConvolvedLinear(config, shared, "kv_heads")
        self.value = ConvolvedLinear(config, wide, "heads")
        self.decay = HeadDecay(config)
        self.skip = parameter((config.num_heads,), ("heads",), ones, "vector")
        self.gate = Linear(config, (width, wide), ("embed", "heads"))
        self.norm = GatedNorm(config, wide)
        self.output = Linear(config, (wide, width), ("heads", "embed"), residual_std(config, num_layers))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        spans, held = resume(context, cache, layer)
        parts, tails = convolve((self.query, self.key, self.value), x, spans, held)
        query, key = (repeat_heads(split_heads(y, num_groups(config), "kv_heads"), config.num_heads) for y in parts[:2])
        value = split_heads(parts[2], config.num_heads, "heads").astype(jnp.float32)
        step, decay = self.decay(x)
        output, state = mix(config, query, key, step[..., None] * value, decay, spans, held.get("state"))
        output = output + self.skip[...][:, None] * value
        gated = output.reshape(*x.shape[:2], -1) * jax.nn.silu(self.gate(x).astype(jnp.float32))
        update = self.output(self.norm.normalize(gated).astype(x.dtype))
        return update, remember(cache, layer, state=state, **tails)

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        specs = state_specs(self.config, batch_size, self.config.state_dim, self.config.head_dim)
        return specs | tail_specs((self.query, self.key, self.value), batch_size)

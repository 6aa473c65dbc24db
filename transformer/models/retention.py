"""Retention: linear attention that forgets at a fixed rate, head by head (Sun et al. 2023, arXiv:2307.08621)."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.attention import split_heads
from transformer.models.cache import Cache, CacheSpec
from transformer.models.layers import Linear, residual_scale
from transformer.models.linear_heads import GatedNorm, LinearHeads
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.positions import rotary_angles, rotate
from transformer.models.state_cache import remember, resume, state_specs


def retention_log_decays(num_heads: int) -> Float[np.ndarray, "N"]:
    """Returns log(1 - 2^(-5 - n)) for each head n (equation 8)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads)))).astype(np.float32)


class Retention(nnx.Module):
    """Queries and keys turned by rotary positions, a decay for each head, group norm and a swish gate (section 2.3)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        self.config = config
        self.heads = LinearHeads(config)
        wide = config.num_heads * config.head_dim
        self.gate = Linear(config, (config.width, wide), ("embed", "heads"))
        self.norm = GatedNorm(config, config.head_dim, centered=True)
        self.output = Linear(config, (wide, config.width), ("heads", "embed"), residual_scale(config, num_layers))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        query, key, value = self.heads(x)
        if context.rotary is not None:
            angles = rotary_angles(context.tokens.positions, config, config.state_dim)
            query, key = rotate(query, angles), rotate(key, angles)
        key = key.astype(jnp.float32) / config.state_dim**0.5
        decay = jnp.broadcast_to(retention_log_decays(config.num_heads), key.shape[:3])
        spans, held = resume(context, cache, layer)
        output, state = mix(config, query, key, value, decay, spans, held.get("state"))
        output = self.norm(output, split_heads(self.gate(x), config.num_heads, "heads"))
        return self.output(output.reshape(*x.shape[:2], -1)), remember(cache, layer, spans, state=state)

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        return state_specs(self.config, batch_size, self.config.state_dim, self.config.head_dim)

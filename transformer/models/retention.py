"""Retention: linear attention that forgets at a fixed rate, head by head (Sun et al. 2023, arXiv:2307.08621)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache
from transformer.models.linear_heads import GatedHeads, LinearHeads
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.rotary import rotary_angles, rotate
from transformer.models.state_cache import remember, resume


def retention_log_decays(num_heads: int) -> Float[np.ndarray, "N"]:
    """Returns log(1 - 2^(-5 - n)) for each head n (equation 8)."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(num_heads)))).astype(np.float32)


class Retention(GatedHeads):
    """Queries and keys turned by rotary positions, a decay for each head, group norm and a swish gate (section 2.3)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        super().__init__(config, num_layers, centered=True)
        self.heads = LinearHeads(config)

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
        return self.gated(output, x), remember(cache, layer, state=state)

"""Gated linear attention: what each dimension of a key forgets depends on the token (Yang et al. 2023, arXiv:2312.06635)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.attention import split_heads
from transformer.models.cache import Cache
from transformer.models.layers import Linear
from transformer.models.linear_heads import GatedHeads, LinearHeads
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.state_cache import remember, resume

DECAY_RANK, DECAY_TEMPERATURE = 16, 16
"""Width from which the decays are made, and the root that is taken of them: they begin near 1 (section 4.4)."""


class GatedLinearAttention(GatedHeads):
    """Decays sigmoid(x W_1 W_2 + b)^(1/16) of each head's key dimensions, RMSNorm of each head, and a swish gate."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        super().__init__(config, num_layers)
        self.heads = LinearHeads(config)
        keys = config.num_heads * config.state_dim
        self.decay_down = Linear(config, (config.width, DECAY_RANK), ("embed", "state"), bias=False)
        # From a width that does not grow, so that under muP it is no matrix.
        self.decay_up = Linear(config, (DECAY_RANK, keys), ("state", "heads"), DECAY_RANK**-0.5, "vector", bias=True)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        query, key, value = self.heads(x)
        query = query.astype(jnp.float32) / config.state_dim**0.5
        raw = split_heads(self.decay_up(self.decay_down(x)), config.num_heads, "heads")
        decay = jax.nn.log_sigmoid(raw.astype(jnp.float32)) / DECAY_TEMPERATURE
        spans, held = resume(context, cache, layer)
        output, state = mix(config, query, key, value, decay, spans, held.get("state"))
        return self.gated(output, x), remember(cache, layer, state=state)

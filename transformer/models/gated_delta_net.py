"""Gated DeltaNet: a state that overwrites what a key stood for, and forgets (Yang et al. 2024, arXiv:2412.06464)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache, CacheSpec
from transformer.models.delta_rule import mix
from transformer.models.head_decay import HeadDecay
from transformer.models.layers import Linear
from transformer.models.linear_heads import GatedHeads, make_heads
from transformer.models.mixers import Context
from transformer.models.short_convolution import ConvolvedLinear, convolve, tail_specs
from transformer.models.state_cache import remember, resume


def unit(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Returns vectors of length 1, in float32; zero stays zero."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


class GatedDeltaNet(GatedHeads):
    """The gated delta rule between short convolutions, and a norm with a gate (section 3.4)."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        super().__init__(config, num_layers)
        shared = config.kv_heads
        self.query = ConvolvedLinear(config, config.num_heads * config.state_dim, "heads")
        self.key = ConvolvedLinear(config, shared * config.state_dim, "kv_heads")
        self.value = ConvolvedLinear(config, shared * config.head_dim, "kv_heads")
        self.decay = HeadDecay(config)
        self.beta = Linear(config, (config.width, config.num_heads), ("embed", "heads"), bias=False)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        spans, held = resume(context, cache, layer)
        parts, tails = convolve((self.query, self.key, self.value), x, spans, held)
        query, key, value = make_heads(config, *parts)
        query, key = unit(query) / config.state_dim**0.5, unit(key)
        beta = jax.nn.sigmoid(self.beta(x).astype(jnp.float32))
        _, decay = self.decay(x)
        output, state = mix(config, query, key, value, decay, beta, spans, held.get("state"))
        return self.gated(output, x), remember(cache, layer, state=state, **tails)

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        specs = super().cache_specs(batch_size, length)
        return specs | tail_specs((self.query, self.key, self.value), batch_size)

"""Linear attention: the softmax's exponential replaced by a product of features (Katharopoulos et al. 2020,
arXiv:2006.16236)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache, CacheSpec
from transformer.models.layers import Linear, residual_std
from transformer.models.linear_heads import LinearHeads
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.state_cache import remember, resume, state_specs

EPSILON = 1e-6


def features(x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Returns elu(x) + 1, in float32: positive."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1


def with_ones(value: Float[Array, "B T N P"]) -> Float[Array, "B T N Q"]:
    """Returns values with one more column, of ones, so that the same recurrence adds up the weights."""
    return jnp.pad(value.astype(jnp.float32), ((0, 0),) * 3 + ((0, 1),), constant_values=1.0)


class LinearAttention(nnx.Module):
    """y_t = sum of phi(q_t) phi(k_s) v_s / sum of phi(q_t) phi(k_s), phi = elu + 1, over s <= t."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        self.config = config
        self.heads = LinearHeads(config)
        wide = config.num_heads * config.head_dim
        self.output = Linear(config, (wide, config.width), ("heads", "embed"), residual_std(config, num_layers))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        query, key, value = self.heads(x)
        spans, held = resume(context, cache, layer)
        query, key, value = features(query), features(key), with_ones(value)
        summed, state = mix(self.config, query, key, value, None, spans, held.get("state"))
        output = summed[..., :-1] / (summed[..., -1:] + EPSILON)
        update = self.output(output.astype(x.dtype).reshape(*x.shape[:2], -1))
        return update, remember(cache, layer, state=state)

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        return state_specs(self.config, batch_size, self.config.state_dim, self.config.head_dim + 1)

"""Attention of a decoder's states to its encoder by a bilinear score, after the recurrent network."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig
from transformer.models.cache import Cache, CacheSpec, keep_memory
from transformer.models.dot_product import attend
from transformer.models.layers import Linear
from transformer.models.masks import Mask
from transformer.models.mixers import Context

KEY_AXES = ("batch", "length", "state")


class LuongAttention(nnx.Module):
    """Global attention with the "general" score (Luong et al. 2015, arXiv:1508.04025, section 3.1): h^T W s.

    Gives the attentional vector tanh(W [c; h]). All steps are computed at once, so it is not fed to the next step's
    input (their section 3.3). The paper has no factor of the scores but begins with small weights; here 1 / sqrt(D) stands
    in their place, under muP one that falls with the width itself; or `attention_scale`.
    """

    def __init__(self, config: ModelConfig, num_layers: int):
        self.config = config
        width = config.width
        self.key = Linear(config, (width, width), ("embed", "state"), width**-0.5, bias=False)
        self.output = Linear(config, (2 * width, width), ("joined", "embed"), (2 * width) ** -0.5)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config, memory = self.config, context.memory
        assert memory is not None
        made = None if memory.hidden is None else (self.key(memory.hidden), memory.hidden)
        cache, (key, value) = keep_memory(cache, layer, made)
        mask = Mask(context.tokens, memory.tokens, causal=False, aligned=False)
        query, key, value = (array[:, :, None] for array in (x, key, value))  # one head
        scale = (
            (config.width * config.width_ratio) ** -0.5 if config.attention_scale is None else config.attention_scale
        )
        options = {"scale": scale, "soft_cap": config.attention_soft_cap, "split": config.context_attention}
        found = attend(config.attention_implementation, query, key, value, mask, **options)
        return jnp.tanh(self.output(jnp.concatenate([found[:, :, 0], x], axis=-1))), cache

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        """Returns what is kept of the `length` columns that the encoder read."""
        shape = (batch_size, length, self.config.width)
        return {name: CacheSpec(shape, KEY_AXES, self.config.compute_dtype) for name in ("key", "value")}

"""Attention whose keys and values are made from a narrow latent, which is all that a cache has to hold (DeepSeek-V2,
arXiv:2405.04434, section 2.1)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.attention import attention_scale, remember_all, split_heads
from transformer.models.cache import Cache, CacheSpec
from transformer.models.dot_product import attend
from transformer.models.layers import Linear, Norm, residual_std
from transformer.models.mixers import Context
from transformer.models.patterns import make_pattern
from transformer.models.rotary import own_rotary, rotary_angles, rotate


class LatentAttention(nnx.Module):
    """Each head has a part of its own, made from latents, and a rotary part, the key of which all heads share.

    Keys are not needed to compute attention: q . (W c) = (W^T q) . c, so that queries may be taken to the latent c
    instead, and values made of what attention has mixed of it. That is less work for a few queries on many columns.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        self.config, self.kind, self.pattern = config, kind, make_pattern(config, kind.pattern)
        heads, head, rotary = config.num_heads, config.head_dim, config.rotary_head_width
        width, latent, query_latent = config.width, config.latent_width, config.query_latent_width
        self.latent = Linear(config, (width, latent), ("embed", "latent"))
        self.latent_norm = Norm(config, latent)
        self.rotary_key = Linear(config, (width, rotary), ("embed", "latent"))
        # Biases of keys and values would not pass through the latent.
        self.key = Linear(config, (latent, heads * head), ("embed", "heads"), bias=False)
        self.value = Linear(config, (latent, heads * head), ("embed", "heads"), bias=False)
        self.query_latent = None if query_latent is None else Linear(config, (width, query_latent), ("embed", "latent"))
        self.query_norm = None if query_latent is None else Norm(config, query_latent)
        self.query = Linear(config, (query_latent or width, heads * (head + rotary)), ("embed", "heads"))
        self.output = Linear(config, (heads * head, width), ("heads", "embed"), residual_std(config, num_layers))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        latent, rotary_key = self.latent_norm(self.latent(x)), self.rotary_key(x)[:, :, None]
        if self.query_latent is not None and self.query_norm is not None:
            x = self.query_norm(self.query_latent(x))
        query = split_heads(self.query(x), config.num_heads, "heads")
        query, rotary_query = query[..., : config.head_dim], query[..., config.head_dim :]
        if config.positions == "rotary" and self.kind.has_positions:
            own = own_rotary(config, self.kind)
            angles = rotary_angles(context.tokens.positions, own, config.rotary_head_width)
            rotary_key, rotary_query = rotate(rotary_key, angles), rotate(rotary_query, angles)
        mask = context.mask(self.pattern)
        if cache is not None:
            new = {"latent": latent, "rotary_key": rotary_key[:, :, 0]}
            cache, (latent, rotary_key) = remember_all(cache, layer, new, context)
            rotary_key = rotary_key[:, :, None]
        is_absorbed = cache is not None and absorbed_is_cheaper(config, mask.num_queries, mask.num_keys)
        if is_absorbed:
            query, value = jnp.einsum("btnh,cnh->btnc", query, self._by_head(self.key, x.dtype)), latent[:, :, None]
            key = jnp.concatenate([value, rotary_key], axis=-1)
        else:
            key, value = (split_heads(part(latent), config.num_heads, "heads") for part in (self.key, self.value))
            shared = jnp.broadcast_to(rotary_key, (*key.shape[:3], rotary_key.shape[-1]))
            key = jnp.concatenate([key, shared], axis=-1)
        query = jnp.concatenate([query, rotary_query], axis=-1)
        whole = dataclasses.replace(config, head_width=config.head_dim + config.rotary_head_width)
        output = attend(
            config.attention_implementation,
            *(query, key, value, mask),
            bias=context.bias,
            scale=attention_scale(whole),
            soft_cap=config.attention_soft_cap,
            split=config.context_attention,
        )
        if is_absorbed:
            output = jnp.einsum("btnc,cnh->btnh", output, self._by_head(self.value, x.dtype))
        return self.output(output.reshape(*x.shape[:2], -1)), cache

    def _by_head(self, linear: Linear, dtype: Any) -> Float[Array, "C N H"]:
        """Returns the matrix that takes latents to the keys, or values, of all heads."""
        return linear.kernel[...].astype(dtype).reshape(self.config.latent_width, self.config.num_heads, -1)

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        config = self.config
        widths = {"latent": config.latent_width, "rotary_key": config.rotary_head_width}
        axes = ("batch", "length", "latent")
        return {name: CacheSpec((batch_size, length, w), axes, config.compute_dtype) for name, w in widths.items()}


def absorbed_is_cheaper(config: ModelConfig, num_queries: int, num_keys: int) -> bool:
    """Returns whether queries are better taken to the latent than keys and values made from it, for a head's products."""
    head, latent, rotary = config.head_dim, config.latent_width, config.rotary_head_width
    pairs, maps = num_queries * num_keys, 2 * latent * head
    return num_queries * maps + pairs * (2 * latent + rotary) < num_keys * maps + pairs * (2 * head + rotary)

"""Scaled dot-product attention with many heads, and the one place where masks are made."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.config import ModelConfig
from transformer.models.layers import Linear, rotate
from transformer.parallel.sharding import constrain


def attention_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    query_segments: Int[Array, "B T"],
    key_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
    """Returns which keys each query may see: of its own segment, and not later than itself.

    Positions rise within a segment, so comparing them is causality; segment 0 is padding, which sees
    nothing and is seen by nothing.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    causal = query_positions[:, :, None] >= key_positions[:, None, :]
    return same & causal & (query_segments != 0)[:, :, None]


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B T S"],
    block: int | None = None,
) -> Float[Array, "B T N H"]:
    """Returns softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, section 3.2.1), the softmax in float32.

    Each key and value head serves N / K query heads (Ainslie et al. 2023, arXiv:2305.13245). A query that
    may see no key gets zero. For a mask in which no query sees a later column, `block` queries at a time may meet only
    the keys up to the last of them: for T much larger than `block`, half the work.
    """
    batch, length, num_heads, head_width = query.shape
    query = (query / math.sqrt(head_width)).reshape(batch, length, key.shape[2], -1, head_width)
    # Heads before tokens: the order in which XLA's CPU backend multiplies fastest.
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2)
    product, outputs = partial(jnp.einsum, preferred_element_type=jnp.float32), []
    for start in range(0, length, block or length):
        rows = slice(start, start + block if block else None)
        keys = slice(rows.stop)
        logits = product("bkgth,bksh->bkgts", query[:, :, :, rows], key[:, :, keys])
        logits = jnp.where(mask[:, None, None, rows, keys], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        outputs.append(product("bkgts,bksh->bkgth", weights, value[:, :, keys]).astype(value.dtype))
    output = jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_width)
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], output, 0)


ATTENTION = {"reference": dot_product_attention, "causal_blocks": partial(dot_product_attention, block=128)}
"""The implementations by name; each computes what `dot_product_attention` does."""

Cache = dict[str, jax.Array]
"""Keys and values of earlier tokens, `key` and `value` [L, B, S, K, H], with their `positions` and `segment_ids`
[B, S], and `index`, the number of columns in use."""


def empty_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """Returns a cache with room for `length` tokens (S) of each of `batch_size` sequences."""
    shape = (config.num_layers, batch_size, length, config.kv_heads, config.head_dim)
    return {
        "key": jnp.zeros(shape, config.compute_dtype),
        "value": jnp.zeros(shape, config.compute_dtype),
        "positions": jnp.zeros((batch_size, length), jnp.int32),
        "segment_ids": jnp.zeros((batch_size, length), jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


@dataclass(frozen=True)
class Shared:
    """What every layer of one forward pass needs besides its input; a pytree."""

    mask: Bool[Array, "B T S"]
    rotary: tuple[Array, Array] | None
    index: Int[Array, ""] | None
    """Column of the cache where the new keys go."""


jax.tree_util.register_dataclass(Shared, ["mask", "rotary", "index"], [])


class SelfAttention(nnx.Module):
    """Multi-head, grouped or multi-query self-attention; heads are stored side by side, [D, N * H]."""

    def __init__(self, config: ModelConfig):
        self.config = config
        width, head = config.width, config.head_dim
        queries, keys = config.num_heads * head, config.kv_heads * head
        self.query = Linear(config, (width, queries), ("embed", "heads"))
        self.key = Linear(config, (width, keys), ("embed", "kv_heads"))
        self.value = Linear(config, (width, keys), ("embed", "kv_heads"))
        residual_scale = config.initial_scale / math.sqrt(2 * config.num_layers)
        self.output = Linear(config, (queries, width), ("heads", "embed"), residual_scale)

    def __call__(
        self, x: Float[Array, "B T D"], shared: Shared, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        batch, length, _ = x.shape

        def heads(linear: Linear, count: int, name: str) -> jax.Array:
            split = linear(x).reshape(batch, length, count, config.head_dim)
            return constrain(split, "batch", "length", name, "head_width")

        query = heads(self.query, config.num_heads, "heads")
        key = heads(self.key, config.kv_heads, "kv_heads")
        value = heads(self.value, config.kv_heads, "kv_heads")
        if shared.rotary is not None:
            query, key = rotate(query, shared.rotary), rotate(key, shared.rotary)
        if cache is not None:
            assert shared.index is not None
            start = (layer, 0, shared.index, 0, 0)
            cache = cache | {
                "key": jax.lax.dynamic_update_slice(cache["key"], key[None], start),
                "value": jax.lax.dynamic_update_slice(cache["value"], value[None], start),
            }
            key = jax.lax.dynamic_index_in_dim(cache["key"], layer, keepdims=False)
            value = jax.lax.dynamic_index_in_dim(cache["value"], layer, keepdims=False)
        # A cache's columns are not in step with the queries.
        implementation = None if cache is not None else config.attention_implementation
        output = ATTENTION[implementation or "reference"](query, key, value, shared.mask)
        return self.output(output.reshape(batch, length, -1)), cache

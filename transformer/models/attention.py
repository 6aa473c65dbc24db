"""Attention with many heads as a layer: of a text to itself, and of a decoder to what its encoder read."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache, CacheSpec, keep_memory, read, write
from transformer.models.dot_product import attend
from transformer.models.layers import Linear, Norm, residual_std
from transformer.models.masks import Mask, Tokens
from transformer.models.mixers import Bias, Context
from transformer.models.patterns import Pattern, make_pattern
from transformer.models.rotary import rotate
from transformer.parallel.sharding import constrain

KEY_AXES = ("batch", "kv_heads", "length", "head_width")
"""Of a cache: a head's columns lie side by side, for a product reads them so, and one query a row is all reading."""


def split_heads(x: Float[Array, "B T E"], count: int, name: str) -> Float[Array, "B T N H"]:
    """Returns heads that are stored side by side, apart."""
    x = constrain(x.reshape(*x.shape[:2], count, -1), "batch", "length", name, "head_width")
    return checkpoint_name(x, "heads")


def attention_scale(config: ModelConfig) -> float:
    """Returns the factor of the products of queries and keys.

    Under muP it falls with the head width itself (Yang et al. 2022, arXiv:2203.03466, definition 4.1), and is that of
    the standard parametrisation for heads of 64.
    """
    if config.attention_scale is not None:
        return config.attention_scale
    return 8 / config.head_dim if config.parametrization == "mup" else 1 / math.sqrt(config.head_dim)


class Heads(nnx.Module):
    """Projections of queries, keys, values and output; heads are stored side by side, [D, N * H]."""

    def __init__(self, config: ModelConfig, num_layers: int):
        self.config = config
        width, head = config.width, config.head_dim
        queries, keys = config.num_heads * head, config.kv_heads * head
        biases = config.attention_biases
        into, out = (None, None) if biases is None else (biases != "none", biases == "all")
        self.query = Linear(config, (width, queries), ("embed", "heads"), bias=into)
        self.key = Linear(config, (width, keys), ("embed", "kv_heads"), bias=into)
        self.value = Linear(config, (width, keys), ("embed", "kv_heads"), bias=into)
        self.output = Linear(config, (queries, width), ("heads", "embed"), residual_std(config, num_layers), bias=out)

    def keys_and_values(self, x: Float[Array, "B S D"]) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Returns the key and the value of every token and head."""
        key, value = (split_heads(linear(x), self.config.kv_heads, "kv_heads") for linear in (self.key, self.value))
        return key, value

    def attended(
        self, query: Array, key: Array, value: Array, mask: Mask, bias: Bias | None = None
    ) -> Float[Array, "B T D"]:
        """Returns what the queries gather from the values, heads joined and projected."""
        config = self.config
        options = {
            "bias": bias,
            "scale": attention_scale(config),
            "soft_cap": config.attention_soft_cap,
            "split": config.context_attention,
        }
        output = attend(config.attention_implementation, query, key, value, mask, **options)
        return self.output(output.reshape(*query.shape[:2], -1))


class SelfAttention(Heads):
    """Multi-head, grouped or multi-query attention of a text to itself."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int):
        super().__init__(config, num_layers)
        self.pattern, self.has_positions = make_pattern(config, kind.pattern), kind.has_positions
        of_all = config.qk_norm_over == "projection"
        queries, keys = (config.num_heads, config.kv_heads) if of_all else (1, 1)
        self.query_norm = Norm(config, queries * config.head_dim) if config.qk_norm else None
        self.key_norm = Norm(config, keys * config.head_dim) if config.qk_norm else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        query = split_heads(self.query(x), self.config.num_heads, "heads")
        key, value = self.keys_and_values(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self._normed(self.query_norm, query), self._normed(self.key_norm, key)
        is_own = self.window is not None and context.window_rotary is not None
        rotary = context.window_rotary if is_own else context.rotary
        if rotary is not None and self.has_positions:
            query, key = rotate(query, rotary), rotate(key, rotary)
        mask = context.mask(self.pattern)
        if cache is not None:
            new = {"key": key, "value": value}
            if self.window is None:
                new = {name: by_head(made) for name, made in new.items()}
                cache, (key, value) = remember_all(cache, layer, new, context, axis=2)
                key, value = by_head(key), by_head(value)
            else:
                cache, (key, value), mask = _remember_window(cache, layer, new, context, mask, self.window.num_sinks)
        return self.attended(query, key, value, mask, context.bias), cache

    def _normed(self, norm: Norm, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
        """Returns heads normalised one by one (Henry et al. 2020, arXiv:2010.04245), or together (OLMo 2, arXiv:2501.00656)."""
        joined = x.reshape(*x.shape[:2], -1) if self.config.qk_norm_over == "projection" else x
        return norm(joined).reshape(x.shape)

    @property
    def window(self) -> Pattern | None:
        """The pattern, if it lets a cache forget."""
        return self.pattern if self.pattern is not None and self.pattern.name == "window" else None

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        config = self.config

        def pair(prefix: str, columns: int) -> dict[str, CacheSpec]:
            shape = (batch_size, config.kv_heads, columns, config.head_dim)
            names = (f"{prefix}key", f"{prefix}value")
            return {name: CacheSpec(shape, KEY_AXES, config.compute_dtype) for name in names}

        if self.window is None:
            return pair("", length)
        sinks = pair("sink_", self.window.num_sinks) if self.window.num_sinks else {}
        return pair("", min(length, self.window.window)) | sinks


def by_head(x: Float[Array, "B T K H"]) -> Float[Array, "B K T H"]:
    """Returns keys or values with heads before tokens; of those, with tokens before heads again."""
    return x.swapaxes(1, 2)


def remember_all(
    cache: Cache, layer: Any, new: dict[str, Array], context: Context, axis: int = 1
) -> tuple[Cache, list[Array]]:
    """Writes new keys and values to their columns, along `axis`; returns the cache, and those of all columns."""
    cache = cache | {name: write(cache[name], layer, value, context.index, axis) for name, value in new.items()}
    return cache, [read(cache[name], layer) for name in new]


def _remember_window(
    cache: Cache, layer: Any, new: dict[str, Array], context: Context, mask: Mask, sinks: int
) -> tuple[Cache, list[Array], Mask]:
    """Keeps only as many columns as the window has, in a ring, and the first tokens of the text where they are sinks.

    The new tokens see the ring as it was, and each other; then those that are not padding overwrite the oldest. Column
    c has its place at c modulo the ring's length.
    """
    index, tokens = context.index, context.tokens
    assert index is not None
    size, length = cache["key"].shape[3], tokens.positions.shape[1]
    slots = jnp.arange(size)
    column = index - 1 - (index - 1 - slots) % size  # the last column before `index` at each place
    held = jax.tree.map(lambda x: jnp.take(x, jnp.maximum(column, 0), axis=1), context.columns)
    held = dataclasses.replace(held, segment_ids=jnp.where(column >= 0, held.segment_ids, 0))
    parts, pieces = [held, tokens], {name: [by_head(read(cache[name], layer)), value] for name, value in new.items()}
    if sinks:
        # A token that is a sink is seen in its own place alone.
        is_sink = (tokens.positions < sinks) & (tokens.segment_ids != 0)
        place = jnp.where(is_sink, tokens.positions, sinks)
        rows = jnp.arange(place.shape[0])[:, None]
        for name, value in new.items():
            kept = by_head(read(cache[f"sink_{name}"], layer))
            kept = kept.at[rows, place].set(value.astype(kept.dtype), mode="drop")
            cache = cache | {f"sink_{name}": write(cache[f"sink_{name}"], layer, by_head(kept))}
            pieces[name].insert(0, kept)
        parts = [
            dataclasses.replace(part, segment_ids=jnp.where(part.positions < sinks, 0, part.segment_ids))
            for part in parts
        ]
        is_used = context.columns.segment_ids != 0
        seen = jnp.max(jnp.where(is_used, context.columns.positions, -1), axis=1, keepdims=True)
        numbers = jnp.broadcast_to(jnp.arange(sinks), (place.shape[0], sinks))
        prefix = context.columns.prefix
        if prefix is not None:
            # A prefix is the begin of a text.
            last = jnp.max(jnp.where(is_used & prefix, context.columns.positions, -1), axis=1, keepdims=True)
            prefix = numbers <= last
        parts.insert(0, Tokens(numbers, jnp.where(numbers <= seen, 1, 0), prefix))
    newest = slice(max(0, length - size), None)
    at = (index + jnp.arange(length)[newest]) % size
    is_token = (tokens.segment_ids[:, newest] != 0)[:, :, None, None]
    for name, value in new.items():
        kept = by_head(read(cache[name], layer))
        fresh = jnp.where(is_token, value[:, newest].astype(kept.dtype), kept[:, at])
        cache = cache | {name: write(cache[name], layer, by_head(kept.at[:, at].set(fresh)))}
    keys = jax.tree.map(lambda *columns: jnp.concatenate(columns, axis=1), *parts)
    joined = [jnp.concatenate(values, axis=1) for values in pieces.values()]
    return cache, joined, dataclasses.replace(mask, key=keys, aligned=False)


class CrossAttention(Heads):
    """A decoder's queries on its encoder's output, the keys and values of which are computed once for each text."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        memory = context.memory
        assert memory is not None
        query = split_heads(self.query(x), self.config.num_heads, "heads")
        made = None
        if memory.hidden is not None:
            key, value = self.keys_and_values(memory.hidden)
            made = by_head(key), by_head(value)
        cache, (key, value) = keep_memory(cache, layer, made)
        key, value = by_head(key), by_head(value)
        mask = Mask(context.tokens, memory.tokens, causal=False, aligned=False)
        return self.attended(query, key, value, mask), cache

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        """Returns what is kept of the `length` columns that the encoder read."""
        shape = (batch_size, self.config.kv_heads, length, self.config.head_dim)
        return {name: CacheSpec(shape, KEY_AXES, self.config.compute_dtype) for name in ("key", "value")}

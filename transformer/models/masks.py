"""Who may see whom: the one place where attention masks are made, whole or a block at a time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from transformer.config import ModelConfig


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a batch stand; a pytree.

    Positions rise by one within a segment. Segment 0 is padding, which sees nothing and is seen by nothing.
    """

    positions: Int[Array, "B T"]
    segment_ids: Int[Array, "B T"]
    prefix: Bool[Array, "B T"] | None = None
    """Tokens that all of their segment sees, also from before; None: there are none."""

    def slice(self, start: Int[Array, ""] | int, size: int) -> "Tokens":
        """Returns `size` columns from `start` on."""
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), self)


jax.tree_util.register_dataclass(Tokens, ["positions", "segment_ids", "prefix"], [])


@dataclass(frozen=True)
class Sparsity:
    """What a pattern leaves of the keys that causality and segments allow; numbers that are known before any data."""

    pattern: str = "full"
    window: int = 0
    num_sinks: int = 0
    dilation: int = 1
    block: int = 1
    num_global: int = 0
    num_window: int = 0
    num_random: int = 0

    @staticmethod
    def of(config: ModelConfig, pattern: str) -> "Sparsity":
        if pattern == "window":
            return Sparsity(pattern, window=config.window, num_sinks=config.num_sinks)
        if pattern == "dilated":
            return Sparsity(pattern, window=config.window, dilation=config.dilation)
        if pattern == "block_sparse":
            counts = (config.num_global_blocks, config.num_window_blocks, config.num_random_blocks)
            return Sparsity(pattern, 0, 0, 1, config.sparse_block, *counts)
        return Sparsity()

    def allows(self, query: Int[Array, "B T 1"], key: Int[Array, "B 1 S"], causal: bool) -> Any:
        """Returns whether a query at one position of a text may see a key at another, [B, T, S], or True for all."""
        if self.pattern == "window":
            # Child et al. 2019 (arXiv:1904.10509); sinks: Xiao et al. 2023 (arXiv:2309.17453).
            return (jnp.abs(query - key) < self.window) | (key < self.num_sinks)
        if self.pattern == "dilated":
            # Beltagy et al. 2020 (arXiv:2004.05150), section 3.1.
            distance = jnp.abs(query - key)
            return (distance < self.window * self.dilation) & (distance % self.dilation == 0)
        if self.pattern == "block_sparse":
            # Zaheer et al. 2020 (arXiv:2007.14062).
            query, key = query // self.block, key // self.block
            near = jnp.abs(query - key) <= self.num_window // 2
            everywhere = (key < self.num_global) | ((query < self.num_global) & (not causal))
            drawn = self._is_drawn(query, key)
            return near | everywhere | (drawn if causal else drawn | self._is_drawn(key, query))
        return True

    def _is_drawn(self, block: Int[Array, "..."], other: Int[Array, "..."]) -> Any:
        """Whether `other` is one of the `num_random` blocks that `block` draws from itself and those before it.

        The draws hash the block's number alone, so that they are the same in a text of any length, and in a cache. A
        model that is not causal follows them both ways.
        """
        found: Any = False
        for draw in range(self.num_random):
            mixed = block.astype(jnp.uint32) * jnp.uint32(self.num_random) + jnp.uint32(draw + 1)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing steps of "lowbias32" (C. Wellons)
                mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
            mixed = mixed ^ (mixed >> 16)
            found |= other == (mixed % (block + 1).astype(jnp.uint32)).astype(jnp.int32)
        return found


FULL = Sparsity()


@dataclass(frozen=True)
class Mask:
    """Which keys each query may see: of its own segment, not later than itself if causal, and left by the pattern.

    A pytree; it describes a mask without being one, so that an implementation need never hold [T, S] of it.
    """

    query: Tokens
    key: Tokens
    causal: bool = True
    aligned: bool = True
    """The keys' columns are the queries' own, and a segment's lie side by side, in order of their positions; not in a cache."""
    sparsity: Sparsity = FULL

    def visible(self) -> Bool[Array, "B T S"]:
        """Returns the mask itself."""
        query, key = self.query.positions[:, :, None], self.key.positions[:, None, :]
        segments = self.query.segment_ids[:, :, None]
        allowed = (segments == self.key.segment_ids[:, None, :]) & (segments != 0)
        if self.causal:
            past = query >= key
            allowed &= past if self.key.prefix is None else past | self.key.prefix[:, None, :]
        return allowed & self.sparsity.allows(query, key, self.causal)

    def queries(self, start: Int[Array, ""] | int, size: int) -> "Mask":
        """Returns the mask of `size` queries from column `start` on."""
        return dataclasses.replace(self, query=self.query.slice(start, size))

    def keys(self, start: Int[Array, ""] | int, size: int) -> "Mask":
        """Returns the mask of `size` keys from column `start` on."""
        return dataclasses.replace(self, key=self.key.slice(start, size))

    @property
    def num_queries(self) -> int:
        return self.query.positions.shape[1]

    @property
    def num_keys(self) -> int:
        return self.key.positions.shape[1]

    @property
    def is_lower_triangular(self) -> bool:
        """Whether it is known before any data that no query sees a later column."""
        return self.aligned and self.causal and self.key.prefix is None

    def columns(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the first column, and the one after the last, that queries of columns `start` to `stop` can see."""
        last = stop if self.is_lower_triangular else self.num_keys
        if not self.aligned or self.sparsity.num_sinks or self.sparsity.pattern not in ("window", "dilated"):
            return 0, last
        reach = (self.sparsity.window - 1) * self.sparsity.dilation
        prefix_or_past = last if self.key.prefix is not None else min(last, stop + reach)
        return max(0, start - reach), prefix_or_past


jax.tree_util.register_dataclass(Mask, ["query", "key"], ["causal", "aligned", "sparsity"])

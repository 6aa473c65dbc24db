"""Patterns of sparse attention: which positions of a text see which."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from transformer.config import ModelConfig


@dataclass(frozen=True)
class Pattern:
    """One of the patterns of `model.layers`, with its numbers: a `masks.Sparsity`."""

    name: str
    window: int = 0
    num_sinks: int = 0
    dilation: int = 1
    block: int = 1
    num_global: int = 0
    num_window: int = 0
    num_random: int = 0

    @property
    def reach(self) -> int | None:
        return None if self.num_sinks or not self.window else (self.window - 1) * self.dilation

    def allows(self, query: Int[Array, "B T 1"], key: Int[Array, "B 1 S"], causal: bool) -> Any:
        """Returns whether a query at one position of a text may see a key at another, [B, T, S], or True for all."""
        if self.name == "window":
            # Child et al. 2019 (arXiv:1904.10509); sinks: Xiao et al. 2023 (arXiv:2309.17453).
            return (jnp.abs(query - key) < self.window) | (key < self.num_sinks)
        if self.name == "dilated":
            # Beltagy et al. 2020 (arXiv:2004.05150), section 3.1.
            distance = jnp.abs(query - key)
            return (distance < self.window * self.dilation) & (distance % self.dilation == 0)
        if self.name == "block_sparse":
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


def make_pattern(config: ModelConfig, name: str) -> Pattern | None:
    """Returns the pattern of a kind of layer, None for `full`."""
    if name == "window":
        return Pattern(name, window=config.window, num_sinks=config.num_sinks)
    if name == "dilated":
        return Pattern(name, window=config.window, dilation=config.dilation)
    if name == "block_sparse":
        blocks = (config.num_global_blocks, config.num_window_blocks, config.num_random_blocks)
        return Pattern(name, 0, 0, 1, config.sparse_block, *blocks)
    return None

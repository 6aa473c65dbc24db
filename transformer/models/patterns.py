"""Patterns of sparse attention: which positions of a text see which."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Int

from transformer.config import ModelConfig

AnyArray = Array | np.ndarray


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
    def kinds(self) -> tuple[str, ...]:
        return (self.name, "sinks") if self.num_sinks else (self.name,)

    @property
    def reach(self) -> int | None:
        return None if self.num_sinks or not self.window else (self.window - 1) * self.dilation

    def allows(self, query: Int[AnyArray, "B T 1"], key: Int[AnyArray, "B 1 S"], causal: bool) -> Any:
        """Returns whether a query at one position of a text may see a key at another, [B, T, S], or True for all.

        NumPy's arrays, by which `count_pairs` asks, get NumPy's.
        """
        if self.name == "window":
            # Child et al. 2019 (arXiv:1904.10509); sinks: Xiao et al. 2023 (arXiv:2309.17453).
            return (abs(query - key) < self.window) | (key < self.num_sinks)
        if self.name == "dilated":
            # Beltagy et al. 2020 (arXiv:2004.05150), section 3.1.
            distance = abs(query - key)
            return (distance < self.window * self.dilation) & (distance % self.dilation == 0)
        if self.name == "block_sparse":
            # Zaheer et al. 2020 (arXiv:2007.14062).
            query, key = query // self.block, key // self.block
            near = abs(query - key) <= self.num_window // 2
            everywhere = (key < self.num_global) | ((query < self.num_global) & (not causal))
            drawn = self._is_drawn(query, key)
            return near | everywhere | (drawn if causal else drawn | self._is_drawn(key, query))
        return True

    def _is_drawn(self, block: Int[AnyArray, "..."], other: Int[AnyArray, "..."]) -> Any:
        """Whether `other` is one of the `num_random` blocks that `block` draws from itself and those before it.

        The draws hash the block's number alone, so that they are the same in a text of any length, and in a cache. A
        model that is not causal follows them both ways.
        """
        found: Any = False
        for draw in range(self.num_random):
            mixed = block.astype(np.uint32) * np.uint32(self.num_random) + np.uint32(draw + 1)
            for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):  # the mixing steps of "lowbias32" (C. Wellons)
                mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
            mixed = mixed ^ (mixed >> 16)
            found |= other == (mixed % (block + 1).astype(np.uint32)).astype(np.int32)
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


def count_pairs(config: ModelConfig, name: str, length: int, causal: bool) -> tuple[int, int]:
    """Returns how many pairs of query and key a layer's pattern leaves in one text, and how many of those its mask leaves.

    Both are exact, and the same if the mask is not causal.
    """
    pattern = make_pattern(config, name)
    if pattern is None:
        whole, past = length**2, length * (length + 1) // 2
    elif pattern.name == "block_sparse":
        whole, past = _count_of_blocks(pattern, length, causal)
    else:
        distance = np.arange(min(length, (pattern.window - 1) * pattern.dilation + 1))[None, :, None]
        allowed = dataclasses.replace(pattern, num_sinks=0).allows(distance, np.zeros((1, 1, 1), int), causal)
        past = int(np.sum(length - distance, where=allowed))
        whole = 2 * past - length
        # Sinks are seen from beyond the window, also by those before it.
        sink = np.arange(min(length, pattern.num_sinks))
        later = int(np.sum(np.maximum(length - sink - pattern.window, 0)))
        whole += later + int(np.sum(np.maximum(sink - pattern.window + 1, 0)))
        past += later
    return whole, past if causal else whole


def _count_of_blocks(pattern: Pattern, length: int, causal: bool) -> tuple[int, int]:
    """Counts block by block: all pairs of two blocks are seen, or none."""
    starts = np.arange(0, length, pattern.block)
    sizes = np.minimum(pattern.block, length - starts)
    whole = past = 0
    for rows in np.split(np.arange(len(starts)), range(256, len(starts), 256)):
        allowed = pattern.allows(starts[None, rows, None], starts[None, None], causal)[0] * sizes[rows, None] * sizes
        below = np.where(starts < starts[rows, None], allowed, 0)
        whole += int(np.sum(allowed))
        past += int(np.sum(below))
    # Every block sees itself, of which causality leaves a triangle.
    return whole, past + int(np.sum(sizes * (sizes + 1) // 2))

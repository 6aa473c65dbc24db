"""Who may see whom: the one place where attention masks are made, whole or a block at a time."""

import dataclasses
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Int


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


@runtime_checkable
class Sparsity(Protocol):
    """What a pattern leaves of the keys that causality and segments allow; it is known before any data."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it is, of the kinds of `config.implementations`."""
        ...

    @property
    def reach(self) -> int | None:
        """Positions up to which a query sees at all, either way; None: any."""
        ...

    def allows(self, query: Int[Array, "B T 1"], key: Int[Array, "B 1 S"], causal: bool) -> Bool[Array, "B T S"]:
        """Returns whether a query at one position of a text may see a key at another."""
        ...


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
    sparsity: Sparsity | None = None
    """None: nothing is left out."""

    def visible(self) -> Bool[Array, "B T S"]:
        """Returns the mask itself."""
        query, key = self.query.positions[:, :, None], self.key.positions[:, None, :]
        segments = self.query.segment_ids[:, :, None]
        allowed = (segments == self.key.segment_ids[:, None, :]) & (segments != 0)
        if self.causal:
            past = query >= key
            allowed &= past if self.key.prefix is None else past | self.key.prefix[:, None, :]
        return allowed if self.sparsity is None else allowed & self.sparsity.allows(query, key, self.causal)

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
        reach = None if self.sparsity is None else self.sparsity.reach
        if reach is None or not self.aligned:
            return 0, last
        return max(0, start - reach), last if self.key.prefix is not None else min(last, stop + reach)


jax.tree_util.register_dataclass(Mask, ["query", "key"], ["causal", "aligned", "sparsity"])

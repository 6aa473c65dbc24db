"""Products of many decays without overflow and without loss: sums of logarithms that differ exactly."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from transformer.models.spans import Spans

LEAST = -100.0
"""A step's log-decay below this is nothing in float32."""
QUANTUM = 1 / 32


@dataclass(frozen=True)
class LogDecay:
    """Sums of log-decays up to each of some tokens; a pytree.

    Float32 would lose the small decays after a strong one in a plain sum. So the multiples of `QUANTUM` are summed
    apart from the rest: those sums are exact, and so are their differences.
    """

    coarse: Float[Array, "..."]
    fine: Float[Array, "..."]

    def __getitem__(self, index: Any) -> "LogDecay":
        return LogDecay(self.coarse[index], self.fine[index])

    def factor(self, since: "LogDecay | None" = None, mask: Bool[Array, "..."] | None = None) -> Float[Array, "..."]:
        """Returns the product of the decays after `since`, or of all; at most 1, and 0 where the mask is False.

        Where `since` is later than these tokens, the mask must be False: nothing above 1 is ever exponentiated.
        """
        total = self.coarse + self.fine
        if since is not None:
            total = (self.coarse - since.coarse) + (self.fine - since.fine)
        return jnp.exp(total if mask is None else jnp.where(mask, total, -jnp.inf))


jax.tree_util.register_dataclass(LogDecay, ["coarse", "fine"], [])


def cumulative(log_decay: Float[Array, "..."], axis: int) -> LogDecay:
    """Returns the sums along a dimension, each token's own decay included."""
    coarse = jax.lax.stop_gradient(jnp.round(log_decay / QUANTUM) * QUANTUM)
    return LogDecay(jnp.cumsum(coarse, axis), jnp.cumsum(log_decay - coarse, axis))


def within_spans(log_decay: Float[Array, "B T N ..."], spans: Spans) -> Float[Array, "B T N ..."]:
    """Returns the log-decays in float32, 0 for padding, and for a span's first token, before which nothing is left."""
    decays = (spans.is_token & ~spans.starts).reshape(*spans.number.shape, *([1] * (log_decay.ndim - 2)))
    return jnp.where(decays, jnp.maximum(log_decay.astype(jnp.float32), LEAST), 0.0)


def masked(x: Float[Array, "B T N ..."], spans: Spans) -> Float[Array, "B T N ..."]:
    """Returns `x` in float32, 0 for padding."""
    mask = spans.is_token.reshape(*spans.number.shape, *([1] * (x.ndim - 2)))
    return jnp.where(mask, x.astype(jnp.float32), 0.0)

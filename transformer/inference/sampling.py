"""Drawing the next token from its logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

from transformer.models.transformer import MASKED_LOGIT


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. None of it compiles anything anew."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep this many of the likeliest tokens (Fan et al. 2018, arXiv:1805.04833); 0: all."""
    top_p: float = 1.0
    """Of these keep the fewest whose probabilities add up to this (Holtzman et al. 2020, arXiv:1904.09751); 1: all."""
    min_p: float = 0.0
    """Keep the tokens at least this share as probable as the likeliest (Nguyen et al. 2024, arXiv:2407.01082); 0: all."""
    repetition_penalty: float = 1.0
    """Makes tokens that have occurred less likely (Keskar et al. 2019, arXiv:1909.05858, section 4.1); 1: as they are."""

    def arrays(self) -> dict[str, Any]:
        """Returns the numbers as arrays without dimensions, which a compiled program takes."""
        types = {"top_k": np.int32}
        return {name: types.get(name, np.float32)(value) for name, value in vars(self).items()}


def kept_logits(
    logits: Float[Array, "V"], sampling: Mapping[str, Any], seen: Bool[Array, "V"] | None = None
) -> Float[Array, "V"]:
    """Returns logits of the distribution that is drawn from, -inf for what it leaves out; at temperature 0 it has one token.

    `sampling` has what `Sampling.arrays` returns, and may have the tokens that are `forbidden`; `seen` are those that have
    occurred. The penalty divides a logit, or multiplies it where it is negative, so that it always makes a token less
    likely.
    """
    if "forbidden" in sampling:
        logits = logits.at[sampling["forbidden"]].set(MASKED_LOGIT)
    temperature, penalty = sampling["temperature"], sampling["repetition_penalty"]
    if seen is not None:
        logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    scaled = logits / jnp.where(temperature > 0, temperature, 1)

    def cut(scaled: Array) -> Array:
        order = jnp.argsort(-scaled)
        rank = jnp.argsort(order)
        kept = jnp.where((sampling["top_k"] == 0) | (rank < sampling["top_k"]), scaled, -jnp.inf)
        descending = jax.nn.softmax(kept)[order]
        before = jnp.cumsum(descending) - descending
        # The sum of everything may round to more than 1 before the last token.
        return jnp.where((sampling["top_p"] >= 1) | (before[rank] < sampling["top_p"]), kept, -jnp.inf)

    # Sorting a vocabulary takes longer than all else.
    is_cut = (sampling["top_k"] > 0) | (sampling["top_p"] < 1)
    kept = jax.lax.cond(is_cut, cut, lambda scaled: scaled, scaled)
    least = jnp.max(scaled) + jnp.log(sampling["min_p"])
    kept = jnp.where(scaled >= least, kept, -jnp.inf)
    is_likeliest = jnp.arange(len(logits)) == jnp.argmax(logits)
    return jnp.where(temperature > 0, kept, jnp.where(is_likeliest, 0, -jnp.inf))


def sample_logits(
    logits: Float[Array, "V"], key: PRNGKeyArray, sampling: Mapping[str, Any], seen: Bool[Array, "V"] | None = None
) -> Int[Array, ""]:
    """Returns a token drawn from the distribution of `kept_logits`."""
    # Drawn in the order of the vocabulary: noise belongs to a token, whatever its rank.
    return jax.random.categorical(key, kept_logits(logits, sampling, seen)).astype(jnp.int32)


def key_of(seed: UInt[Array, ""], row: Int[Array, "2"], number: Int[Array, ""]) -> PRNGKeyArray:
    """Returns the key of one draw: it depends on the row's own numbers (prompt and sample), not on its batch."""
    key = jax.random.key(seed)
    for part in (*row, number):
        key = jax.random.fold_in(key, part)
    return key

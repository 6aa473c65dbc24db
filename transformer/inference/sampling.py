"""Drawing the next token from its logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def sample_logits(
    logits: Float[Array, "V"],
    key: PRNGKeyArray,
    temperature: Float[Array, ""] | float,
    top_k: Int[Array, ""] | int,
    top_p: Float[Array, ""] | float,
) -> Int[Array, ""]:
    """Returns a token drawn from softmax(logits / temperature), cut down to its most likely tokens.

    `top_k` keeps that many tokens (Fan et al. 2018, arXiv:1805.04833), 0 all; of these `top_p` keeps the fewest whose
    probabilities add up to it (Holtzman et al. 2020, arXiv:1904.09751), 1 all. Temperature 0 takes the likeliest.
    """
    scaled = logits / jnp.where(temperature > 0, temperature, 1)
    order = jnp.argsort(-scaled)
    rank = jnp.argsort(order)
    kept = jnp.where((top_k == 0) | (rank < top_k), scaled, -jnp.inf)
    descending = jax.nn.softmax(kept)[order]
    before = jnp.cumsum(descending) - descending
    # The sum of everything may round to more than 1 before the last token.
    kept = jnp.where((top_p >= 1) | (before[rank] < top_p), kept, -jnp.inf)
    # Drawn in the order of the vocabulary: noise belongs to a token, whatever its rank.
    return jnp.where(temperature > 0, jax.random.categorical(key, kept), jnp.argmax(logits)).astype(jnp.int32)

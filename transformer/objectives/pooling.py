"""Where the class or the number of a whole text is told: at one of its tokens, which has its weight, or by all of them."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.config import Config, ObjectiveConfig
from transformer.data.shards import Window
from transformer.models.transformer import Outputs


def told(config: Config, window: Window) -> np.ndarray:
    """Returns the weights of a row of texts: 1 at the token of each at which its label is told.

    A model that sees the past alone tells it at the last token of the text, `eos` (Radford et al. 2018, "Improving Language
    Understanding by Generative Pre-Training", section 3.2); one that sees everything at the first, `bos` (Devlin et al.
    2019, arXiv:1810.04805, section 4.1). A mean is told at the first as well.
    """
    segments, pooling = window["segment_ids"], config.objective.pooling
    last = pooling == "last" or (pooling == "auto" and not config.model.has_encoder)
    other = np.append(segments[1:], 0) if last else np.append(0, segments[:-1])
    return (segments != other).astype(np.float32)


def pooled(config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Outputs:
    """Returns the outputs with hidden states that stand for whole texts, wherever a label is told."""
    if config.pooling != "mean":
        return outputs
    return dataclasses.replace(outputs, hidden=means(outputs.hidden, batch["segment_ids"]))


def means(hidden: Float[Array, "B T D"], segment_ids: Array) -> Float[Array, "B T D"]:
    """Returns at every token the mean of the hidden states of its text."""
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]).astype(jnp.float32)
    share = same / jnp.sum(same, axis=-1, keepdims=True)
    return jnp.einsum("bts,bsd->btd", share, hidden.astype(jnp.float32))

"""What BERT has between its last layer and its heads (Devlin et al. 2019, arXiv:1810.04805, and its published code)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from transformer.config import ModelConfig
from transformer.models.layers import Linear, Norm
from transformer.models.mlp import ACTIVATIONS
from transformer.models.parameters import parameter, zeros

_AXES = ("embed", "hidden")
"""Of maps from the width to itself, which `tensor` leaves whole: a norm follows, or a row of labels."""


class HeadTransform(nnx.Module):
    """A linear map, the MLP's activation and a norm, before the head over the vocabulary."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.dense = Linear(config, (config.width, config.width), _AXES)
        self.norm = Norm(config)

    def __call__(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.norm(ACTIVATIONS[self.config.activation](self.dense(hidden)))


class Pooler(Linear):
    """A linear map and tanh, before the head over labels."""

    def __init__(self, config: ModelConfig):
        super().__init__(config, (config.width, config.width), _AXES)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return jnp.tanh(super().__call__(x))


def make_heads(config: ModelConfig, padding_rows: int) -> tuple[HeadTransform | None, Any, Pooler | None]:
    """Returns what comes before the head over the vocabulary, that head's bias, and what comes before labels.

    A classifier has no head over the vocabulary. The pooler of a model without labels waits for them, or for `embed`.
    """
    has_head = not config.num_labels
    transform = HeadTransform(config) if has_head and config.head_transform else None
    axes = (config.vocab_rows,), ("vocab",)
    bias = parameter(*axes, zeros, "bias", padding_rows) if has_head and config.head_bias else None
    return transform, bias, Pooler(config) if config.pooler else None

"""What follows mixing in a block, token by token: the table of kinds, and what each gives back besides its output."""

import importlib
from typing import Any

from jaxtyping import Array, Float

from transformer.config import LayerKind, ModelConfig

Auxiliary = dict[str, dict[str, tuple[Float[Array, ""], Float[Array, ""]]]]
"""Terms of a layer's own, each (sum, weight): `losses`, and `statistics` that are only reported."""

FEEDFORWARDS: dict[str, tuple[str, str]] = {
    "dense": ("transformer.models.mlp", "MLP"),
    "experts": ("transformer.models.experts", "Experts"),
}
"""Module and class by name, loaded when a model asks for them."""


def make_feedforward(config: ModelConfig, kind: LayerKind, num_layers: int) -> Any:
    """Returns the feed-forward part of a layer, None for a layer without."""
    if kind.feedforward == "none":
        return None
    module, name = FEEDFORWARDS[kind.feedforward]
    return getattr(importlib.import_module(module), name)(config, num_layers)

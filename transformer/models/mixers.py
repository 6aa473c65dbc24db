"""What lets tokens exchange information: the table of mixers, and what each is given and gives back."""

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float, Int

from transformer.config import RECURRENT, LayerKind, ModelConfig
from transformer.models.cache import Cache, CacheSpec
from transformer.models.masks import Mask, Sparsity, Tokens
from transformer.models.positions import Angles


@runtime_checkable
class Bias(Protocol):
    """What positions add to the products of queries and keys; a pytree."""

    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "#B N T S"]: ...


@dataclass(frozen=True)
class Memory:
    """What a decoder reads: the encoder's output, or None when its keys and values are in the cache; a pytree."""

    hidden: Float[Array, "B S D"] | None
    tokens: Tokens


@dataclass(frozen=True)
class Context:
    """What every layer of one forward pass needs besides its input; a pytree."""

    tokens: Tokens
    """Those of the input."""
    columns: Tokens
    """Those that a layer's keys stand for: the same, or all that a cache has room for."""
    index: Int[Array, ""] | None = None
    """Column of the cache where the new tokens go; None: there is no cache."""
    rotary: Angles | None = None
    window_rotary: Angles | None = None
    """Those of layers with a window, where they have a base of their own."""
    bias: Bias | None = None
    memory: Memory | None = None
    causal: bool = True

    def mask(self, sparsity: Sparsity | None = None) -> Mask:
        """Returns who may see whom of the tokens of one stack."""
        return Mask(self.tokens, self.columns, self.causal, self.index is None, sparsity)


jax.tree_util.register_dataclass(Memory, ["hidden", "tokens"], [])
_ARRAYS = ["tokens", "columns", "index", "rotary", "window_rotary", "bias", "memory"]
jax.tree_util.register_dataclass(Context, _ARRAYS, ["causal"])


@runtime_checkable
class MixerModule(Protocol):
    """Module of one layer: `Mixer(config, kind, num_layers)`, `num_layers` being the depth of its stack."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Returns what is added to the residual stream, and the cache with the new tokens in it.

        `cache` has the arrays of `cache_specs` with a leading dimension for layers, of which this is number `layer`.
        Tokens of segment 0 change nothing, and no token sees another segment.
        """
        ...

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        """Returns what the layer remembers of up to `length` tokens of each of `batch_size` sequences.

        A mixer that reads the encoder (`reads_memory`) is given the length of what it reads as well.
        """
        ...


MIXERS: dict[str, tuple[str, str]] = {
    "attention": ("transformer.models.attention", "SelfAttention"),
    "latent_attention": ("transformer.models.latent_attention", "LatentAttention"),
    "linear_attention": ("transformer.models.linear_attention", "LinearAttention"),
    "performer": ("transformer.models.performer", "Performer"),
    "retention": ("transformer.models.retention", "Retention"),
    "gated_linear_attention": ("transformer.models.gated_linear_attention", "GatedLinearAttention"),
    "gated_delta_net": ("transformer.models.gated_delta_net", "GatedDeltaNet"),
    "mamba2": ("transformer.models.mamba2", "Mamba2"),
    **{name: ("transformer.models.recurrent", "Recurrent") for name in RECURRENT},
}
"""Module and class by name, loaded when a model asks for them."""

CROSS_ATTENTION: dict[str, tuple[str, str]] = {
    "attention": ("transformer.models.attention", "CrossAttention"),
    "luong": ("transformer.models.luong", "LuongAttention"),
}
"""What reads the encoder after the mixer, in the same way; additive attention (`bahdanau`) is part of the recurrence."""


def reads_memory(config: ModelConfig, kind: LayerKind) -> bool:
    """Returns whether a decoder's mixer reads the encoder itself, step by step; minGRU has no steps."""
    return config.cross_attention == "bahdanau" and kind.mixer in ("lstm", "gru")


def make_mixer(
    config: ModelConfig, kind: LayerKind, num_layers: int, causal: bool = True, reads_encoder: bool = False
) -> Any:
    """Returns the mixer of a layer. Recurrent ones have other parameters where they see the future, or the encoder."""
    module, name = MIXERS[kind.mixer]
    options = (causal, reads_encoder and reads_memory(config, kind)) if kind.mixer in RECURRENT else ()
    return getattr(importlib.import_module(module), name)(config, kind, num_layers, *options)


def make_bias(config: ModelConfig, causal: bool) -> Any:
    """Returns the module that makes a stack's bias, None where positions are told otherwise."""
    if config.positions not in ("alibi", "relative"):
        return None
    return importlib.import_module("transformer.models.biases").PositionBias(config, causal)


def make_cross_attention(config: ModelConfig, num_layers: int) -> Any:
    """Returns the part of a decoder's block that reads the encoder, None where mixers do that themselves."""
    if config.cross_attention not in CROSS_ATTENTION:
        return None
    module, name = CROSS_ATTENTION[config.cross_attention]
    return getattr(importlib.import_module(module), name)(config, num_layers)

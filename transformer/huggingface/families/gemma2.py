"""Gemma 2 (Gemma team 2024, arXiv:2408.00118): windows in every other layer, norms by 1 + w before and after, soft caps."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import llama
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import only_false, with_defaults, without
from transformer.huggingface.families.layers import layers, windows_by_type
from transformer.huggingface.families.llama import LAYER
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.header import shown
from transformer.huggingface.table import Key, Line, Translation, norm

SANDWICH = tuple(
    line
    for theirs, ours in {
        "input_layernorm": "mixer_norm",
        "post_attention_layernorm": "mixer_output_norm",
        "pre_feedforward_layernorm": "feedforward_norm",
        "post_feedforward_layernorm": "feedforward_output_norm",
    }.items()
    for line in norm(f"layers.{{layer}}.{theirs}", f"{LAYER}/{ours}", offset=1.0)
)

LINES = (
    Line("embed_tokens.weight", "embedding"),
    *norm("norm", "decoder/final_norm", offset=1.0),
    Line("lm_head.weight", "head"),
    *SANDWICH,
    *llama.ATTENTION,
    *llama.MLP,
)

DEFAULTS = {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
DEFAULTS |= {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}

KEYS = (
    *without(llama.FAMILY.keys, "hidden_act"),
    Key("hidden_activation", "activation", "gelu_pytorch_tanh", llama.ACTIVATION.values),
)


def soft_caps(attention: float | None, logits: float | None) -> Translation:
    """Returns the translation of the two caps, which are None there and 0 here where there is none."""
    keys = {"attn_logit_softcapping": ("attention_soft_cap", attention)}
    keys |= {"final_logit_softcapping": ("logit_soft_cap", logits)}

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        found = {ours: theirs.get(key, default) for key, (ours, default) in keys.items()}
        return {ours: 0.0 if value is None else value for ours, value in found.items()}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {key: getattr(model, ours) or None for key, (ours, _) in keys.items()}

    return Translation(tuple(keys), read, write)


def _read_scale(theirs: Mapping[str, Any]) -> dict[str, Any]:
    scalar = theirs.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, int | float) or not 0 < scalar < 2**31:
        raise ConfigError(f"query_pre_attn_scalar = {shown(scalar)}: must be a number greater than 0")
    return {"attention_scale": 1 / math.sqrt(scalar)}


def _write_scale(model: ModelConfig) -> dict[str, Any]:
    assert model.attention_scale is not None, "canonical"
    scalar = round(model.attention_scale**-2)
    if scalar < 1 or not math.isclose(1 / math.sqrt(scalar), model.attention_scale, rel_tol=1e-12):
        wanted = "query_pre_attn_scalar has to be a whole number, of which it is 1 / sqrt"
        raise ConfigError(f"model.attention_scale = {model.attention_scale}: {wanted}")
    return {"query_pre_attn_scalar": scalar}


SCALE = Translation(("query_pre_attn_scalar",), _read_scale, _write_scale)


def _read_embedding_scale(theirs: Mapping[str, Any]) -> dict[str, Any]:
    width = theirs.get("hidden_size", DEFAULTS["hidden_size"])
    return {"embedding_scale": math.sqrt(width)} if type(width) is int and 0 < width < 2**31 else {}


def _write_embedding_scale(model: ModelConfig) -> dict[str, Any]:
    if model.embedding_scale != math.sqrt(model.width):
        wanted = f"must be the root of the width, {math.sqrt(model.width)}"
        raise ConfigError(f"model.embedding_scale = {model.embedding_scale}: {wanted}")
    return {}


EMBEDDING_SCALE = Translation(("hidden_size",), _read_embedding_scale, _write_embedding_scale)

CONSTANTS = {"norm": "rmsnorm", "norm_placement": "sandwich"}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    lines=LINES,
    keys=with_defaults(KEYS, **DEFAULTS, vocab_size=256000, max_position_embeddings=8192),
    constants=CONSTANTS,
    translations=(
        rotary(),
        biases(),
        soft_caps(50.0, 30.0),
        SCALE,
        EMBEDDING_SCALE,
        layers(26, windows_by_type(lambda theirs, depth: [layer % 2 == 0 for layer in range(depth)])),
        only_false("use_bidirectional_attention"),
    ),
    harmless=("hidden_act", "cache_implementation"),
)

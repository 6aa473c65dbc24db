"""Gemma 3 (Gemma team 2025, arXiv:2503.19786), its text model: five layers with a window, which have a rotary base of their own, to
one without; queries and keys normalised head by head."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import gemma2, llama
from transformer.huggingface.families import rotary as spelling
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import only_false, with_defaults
from transformer.huggingface.families.layers import layers, whole_number, windows_by_type
from transformer.huggingface.families.llama import LAYER
from transformer.huggingface.header import shown
from transformer.huggingface.table import Translation, norm

_BASES = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}


def _read_rotary(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Reads what transformers 5 writes, an object for each type of layer, or the keys before."""
    said = theirs.get("rope_parameters")
    if said is None:
        base = theirs.get("rope_local_base_freq", _BASES["sliding_attention"])
        return spelling.read(theirs, _BASES["full_attention"]) | {"window_rotary_base": base}
    if not isinstance(said, Mapping) or not all(isinstance(said.get(name) or {}, Mapping) for name in _BASES):
        raise ConfigError(f"rope_parameters = {shown(said)}: must have an object for {' and '.join(_BASES)}")
    full, window = (
        spelling.read({**theirs, "rope_parameters": {"rope_theta": base, **(said.get(name) or {})}}, base)
        for name, base in _BASES.items()
    )
    if window["rotary_scaling"] != "none" or window["rotary_share"] != full["rotary_share"]:
        own = shown(said["sliding_attention"])
        raise ConfigError(f"rope_parameters.sliding_attention = {own}: only a rope_theta of its own is read")
    return full | {"window_rotary_base": window["rotary_base"]}


def _write_rotary(model: ModelConfig) -> dict[str, Any]:
    base = model.window_rotary_base
    has_window = any(kind.pattern == "window" for kind in (*model.first_kinds, *model.kinds))
    if base is None and has_window and model.rotary_scaling != "none":
        scaled = f"model.rotary_scaling = {model.rotary_scaling!r}"
        raise ConfigError(f"{scaled}: layers with a window are not scaled; give model.window_rotary_base")
    if base is None:
        base = model.rotary_base if has_window else _BASES["sliding_attention"]
    return spelling.write(model) | {"rope_local_base_freq": base}


def _has_window(theirs: Mapping[str, Any], depth: int) -> list[bool]:
    period = whole_number(theirs, "sliding_window_pattern", 6, 1)
    return [(layer + 1) % period != 0 for layer in range(depth)]


ROTARY = ("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    lines=(
        *gemma2.LINES,
        *norm("layers.{layer}.self_attn.q_norm", f"{LAYER}/mixer/query_norm", offset=1.0),
        *norm("layers.{layer}.self_attn.k_norm", f"{LAYER}/mixer/key_norm", offset=1.0),
    ),
    keys=with_defaults(gemma2.KEYS, **gemma2.DEFAULTS, vocab_size=262_208, max_position_embeddings=131_072),
    constants={**gemma2.CONSTANTS, "qk_norm": True},
    translations=(
        Translation(ROTARY, _read_rotary, _write_rotary),
        biases(),
        gemma2.soft_caps(None, None),
        gemma2.SCALE,
        gemma2.EMBEDDING_SCALE,
        layers(26, windows_by_type(_has_window)),
        only_false("use_bidirectional_attention"),
    ),
    repeats=llama.FAMILY.repeats,
    harmless=("hidden_act", "cache_implementation", "sliding_window_pattern", "_sliding_window_pattern"),
)

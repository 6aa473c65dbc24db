"""Qwen3 with experts in all layers, or in some."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import llama, qwen3
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import (
    PROJECTIONS,
    dense_width,
    experts,
    several_experts,
    with_defaults,
    without,
)
from transformer.huggingface.families.layers import Aspect, layers, whole_number, windows_everywhere
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.header import shown
from transformer.huggingface.table import Key, Translation

_DEFAULTS = {"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "num_key_value_heads": 4}
_DEFAULTS |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}


def _read_experts(theirs: Mapping[str, Any], depth: int) -> tuple[Sequence[bool], dict[str, Any]]:
    step, dense = whole_number(theirs, "decoder_sparse_step", 1, 1), theirs.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ConfigError(f"mlp_only_layers = {shown(dense)}: must be a list of numbers of layers")
    return [(layer + 1) % step == 0 and layer not in set(dense) for layer in range(depth)], {}


def _write_experts(model: ModelConfig, flags: Sequence[bool]) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, flag in enumerate(flags) if not flag]}


FAMILY = dataclasses.replace(
    qwen3.FAMILY,
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    lines=(*qwen3.FAMILY.lines, *experts("mlp.gate", "mlp.experts", PROJECTIONS)),
    keys=(
        *with_defaults(without(llama.FAMILY.keys, "intermediate_size"), **_DEFAULTS),
        Key("num_experts_per_tok", "experts_per_token", 8),
        Key("moe_intermediate_size", "expert_width", 768),
    ),
    translations=(
        rotary(),
        biases(),
        dense_width(6144),
        several_experts("num_experts_per_tok", False),
        # transformers 5 writes the second name, and reads both.
        Translation(
            ("num_experts", "num_local_experts"),
            lambda theirs: {"num_experts": theirs.get("num_experts", theirs.get("num_local_experts", 128))},
            lambda model: {"num_experts": model.num_experts},
        ),
        layers(
            24,
            windows_everywhere(4096, has_switch=True),
            Aspect("experts", ("decoder_sparse_step", "mlp_only_layers"), _read_experts, _write_experts),
        ),
    ),
    harmless=("max_window_layers", "output_router_logits", "router_aux_loss_coef"),
)

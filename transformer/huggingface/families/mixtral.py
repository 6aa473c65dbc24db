"""Mixtral (Jiang et al. 2024, arXiv:2401.04088): Mistral with experts in every layer."""

import dataclasses

from transformer.huggingface.families import llama
from transformer.huggingface.families.decoders import experts, several_experts, with_defaults, without
from transformer.huggingface.families.layers import layers, windows_everywhere
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.table import Key

_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "rms_norm_eps": 1e-5}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    lines=(
        *llama.ENDS,
        *llama.PRE_NORMS,
        *llama.ATTENTION,
        *experts("block_sparse_moe.gate", "block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    ),
    keys=(
        *with_defaults(without(llama.FAMILY.keys, "intermediate_size"), **_DEFAULTS),
        Key("intermediate_size", "expert_width", 14336),
        Key("num_local_experts", "num_experts", 8),
        Key("num_experts_per_tok", "experts_per_token", 2),
    ),
    constants={"norm": "rmsnorm"},
    translations=(
        rotary(1_000_000.0),
        several_experts("num_experts_per_tok", True, has_key=False),
        layers(32, windows_everywhere(None), has_dense=False),
    ),
    harmless=("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
)

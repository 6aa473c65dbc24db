"""Qwen2 and 2.5 (Yang et al. 2024, arXiv:2407.10671): Llama with biases of queries, keys and values, and windows in late layers."""

import dataclasses

from transformer.huggingface.families import llama
from transformer.huggingface.families.decoders import with_defaults
from transformer.huggingface.families.layers import beyond_first, layers, windows_by_type
from transformer.huggingface.families.rotary import rotary

DEFAULTS = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "rms_norm_eps": 1e-6}
DEFAULTS |= {"max_position_embeddings": 32768}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    keys=with_defaults(llama.FAMILY.keys, **DEFAULTS),
    constants={"norm": "rmsnorm", "attention_biases": "qkv"},
    translations=(rotary(), layers(32, windows_by_type(beyond_first, has_switch=True))),
    harmless=("max_window_layers",),
)

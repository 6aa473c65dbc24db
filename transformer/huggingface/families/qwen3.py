"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Qwen2 without its biases, and with queries and keys normalised head by head."""

import dataclasses

from transformer.huggingface.families import llama, qwen2
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import PER_HEAD_NORMS, with_defaults
from transformer.huggingface.families.layers import beyond_first, layers, windows_by_type
from transformer.huggingface.families.rotary import rotary

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    lines=(*llama.FAMILY.lines, *PER_HEAD_NORMS),
    keys=with_defaults(llama.FAMILY.keys, **qwen2.DEFAULTS, head_dim=128),
    constants={"norm": "rmsnorm", "qk_norm": True},
    translations=(rotary(), biases(), layers(32, windows_by_type(beyond_first, has_switch=True))),
    harmless=("max_window_layers",),
)

"""OLMo 2 (OLMo team 2025, arXiv:2501.00656): norms of what sublayers give, and of all queries, and all keys, of a token together."""

import dataclasses

from transformer.huggingface.families import llama
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import PER_HEAD_NORMS, with_defaults
from transformer.huggingface.families.layers import layers
from transformer.huggingface.families.llama import LAYER
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.table import norm

OUTPUT_NORMS = (
    *norm("layers.{layer}.post_attention_layernorm", f"{LAYER}/mixer_output_norm"),
    *norm("layers.{layer}.post_feedforward_layernorm", f"{LAYER}/feedforward_output_norm"),
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    lines=(*llama.ENDS, *OUTPUT_NORMS, *llama.ATTENTION, *llama.MLP, *PER_HEAD_NORMS),
    keys=with_defaults(llama.FAMILY.keys, vocab_size=50304, rms_norm_eps=1e-5),
    constants={"norm": "rmsnorm", "norm_placement": "output", "qk_norm": True, "qk_norm_over": "projection"},
    translations=(rotary(), biases(), layers(32)),
)

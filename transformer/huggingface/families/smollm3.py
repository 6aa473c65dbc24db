"""SmolLM3 (Hugging Face 2025): Llama with every fourth layer told no positions (Yang et al. 2025, arXiv:2501.18795)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from transformer.config import ConfigError
from transformer.huggingface.families import llama
from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.decoders import with_defaults
from transformer.huggingface.families.layers import Aspect, layers, whole_number, windows_by_type
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.header import shown

_DEFAULTS = {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
_DEFAULTS |= {"num_key_value_heads": 4, "max_position_embeddings": 32768, "tie_word_embeddings": True}


def _without_positions(theirs: Mapping[str, Any], depth: int) -> list[bool]:
    told, step = theirs.get("no_rope_layers"), whole_number(theirs, "no_rope_layer_interval", 4, 1)
    if told is None:
        return [(layer + 1) % step == 0 for layer in range(depth)]
    if not isinstance(told, list) or len(told) < depth or not all(flag in (0, 1) for flag in told):
        raise ConfigError(f"no_rope_layers = {shown(told)}: must be a list of 0 (none) and 1 (rotary) for each layer")
    return [not flag for flag in told[:depth]]


def _read(theirs: Mapping[str, Any], depth: int) -> tuple[Sequence[bool], dict[str, Any]]:
    return _without_positions(theirs, depth), {}


FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="smollm3",
    architecture="SmolLM3ForCausalLM",
    keys=with_defaults(llama.FAMILY.keys, **_DEFAULTS),
    constants={"norm": "rmsnorm"},
    translations=(
        rotary(2_000_000.0),
        biases(has_mlp=True),
        layers(
            36,
            windows_by_type(_without_positions, None, has_switch=True),
            Aspect(
                "no_positions",
                ("no_rope_layers", "no_rope_layer_interval"),
                _read,
                lambda model, flags: {"no_rope_layers": [int(not flag) for flag in flags]},
            ),
        ),
    ),
    harmless=("max_window_layers",),
)

"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a window on every layer, or, in later releases, none."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import llama
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.table import Key, Translation


def _read_window(theirs: Mapping[str, Any]) -> dict[str, Any]:
    window = theirs.get("sliding_window", 4096)
    return {"layers": "attention"} if window is None else {"layers": "attention.window", "window": window}


def _write_window(model: ModelConfig) -> dict[str, Any]:
    if model.layers not in ("attention", "attention.window"):
        raise ConfigError(
            f"model.layers = {model.layers!r}: mistral has 'attention' or 'attention.window' in all layers"
        )
    return {"sliding_window": None if model.layers == "attention" else model.window}


_DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}

FAMILY = dataclasses.replace(
    llama.FAMILY,
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys=tuple(
        Key(key.theirs, key.ours, _DEFAULTS.get(key.theirs, key.default), key.values) for key in llama.FAMILY.keys
    ),
    constants={"norm": "rmsnorm", "biases": False},
    translations=(rotary(), Translation(("sliding_window",), _read_window, _write_window)),
)

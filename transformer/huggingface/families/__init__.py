"""The families that there are tables for, by the `model_type` of config.json."""

import importlib

from transformer.huggingface.folder import unsupported
from transformer.huggingface.table import Family

FAMILIES: dict[str, str] = {
    "gpt2": "transformer.huggingface.families.gpt2",
    "llama": "transformer.huggingface.families.llama",
    "mistral": "transformer.huggingface.families.mistral",
    "qwen2": "transformer.huggingface.families.qwen2",
    "qwen3": "transformer.huggingface.families.qwen3",
    "qwen3_moe": "transformer.huggingface.families.qwen3_moe",
    "gemma2": "transformer.huggingface.families.gemma2",
    "gemma3_text": "transformer.huggingface.families.gemma3",
    "olmo2": "transformer.huggingface.families.olmo2",
    "smollm3": "transformer.huggingface.families.smollm3",
    "mixtral": "transformer.huggingface.families.mixtral",
    "deepseek_v3": "transformer.huggingface.families.deepseek_v3",
}
"""Module by model_type; each has a table, FAMILY. The order is that in which an export looks for one that fits."""


def family_of(model_type: object) -> Family:
    """Returns the table of a model_type; raises ConfigError, with the nearest that there is, for any other."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise unsupported(model_type, tuple(FAMILIES))
    return importlib.import_module(FAMILIES[model_type]).FAMILY

"""How config.json tells of the biases of linear maps."""

from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.header import shown
from transformer.huggingface.table import Translation


def biases(has_mlp: bool = False) -> Translation:
    """Returns the translation of `attention_bias`, of queries, keys, values and output, and of `mlp_bias`."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        attention, mlp = (theirs.get(key, False) for key in ("attention_bias", "mlp_bias"))
        for key, value in (("attention_bias", attention), ("mlp_bias", mlp)):
            if value is not None and type(value) is not bool:
                raise ConfigError(f"{key} = {shown(value)}: must be True or False")
        return {"biases": bool(mlp) and has_mlp, "attention_biases": "all" if attention else "none"}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.attention_biases == "qkv":
            raise ConfigError("model.attention_biases = 'qkv': attention's maps have biases all or none")
        attention = model.biases if model.attention_biases is None else model.attention_biases == "all"
        return {"attention_bias": attention} | ({"mlp_bias": model.biases} if has_mlp else {})

    return Translation(("attention_bias", *["mlp_bias"] * has_mlp), read, write)

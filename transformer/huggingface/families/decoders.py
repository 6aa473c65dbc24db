"""What decoders after Llama have in common: lines and keys that several tables take."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families.llama import LAYER
from transformer.huggingface.header import shown
from transformer.huggingface.table import Key, Line, Translation, norm

PER_HEAD_NORMS = tuple(
    line
    for theirs, ours in (("q_norm", "query_norm"), ("k_norm", "key_norm"))
    for line in norm(f"layers.{{layer}}.self_attn.{theirs}", f"{LAYER}/mixer/{ours}")
)
"""Norms of queries and keys, over whatever they are."""


def experts(router: str, expert: str, names: Mapping[str, str]) -> tuple[Line, ...]:
    """Returns the lines of a router and of the experts' matrices: theirs by the name of ours."""
    ours = f"{LAYER}/feedforward"
    return (
        Line(f"layers.{{layer}}.{router}.weight", f"{ours}/router/kernel", transposed=True),
        *(
            Line(f"layers.{{layer}}.{expert}.{{expert}}.{theirs}.weight", f"{ours}/{name}", transposed=True)
            for name, theirs in names.items()
        ),
    )


PROJECTIONS = {name: f"{name}_proj" for name in ("gate", "up", "down")}


def with_defaults(keys: Sequence[Key], **defaults: Any) -> tuple[Key, ...]:
    """Returns keys with other defaults."""
    return tuple(Key(key.theirs, key.ours, defaults.get(key.theirs, key.default), key.values) for key in keys)


def without(keys: Sequence[Key], *names: str) -> tuple[Key, ...]:
    """Returns the keys but for these of theirs."""
    return tuple(key for key in keys if key.theirs not in names)


def dense_width(default: int) -> Translation:
    """Returns the translation of the width of MLPs for a family in which no layer need have one: a number all the same."""
    return Translation(
        ("intermediate_size",),
        lambda theirs: {"feedforward_width": theirs.get("intermediate_size", default)},
        lambda model: {"intermediate_size": model.ff_width},
    )


def several_experts(key: str, is_normalized: bool, has_key: bool = True) -> Translation:
    """Returns the translation of whether weights are divided by their sum: `is_normalized`, unless `norm_topk_prob` says else.

    Of one expert, theirs is then 1, and ours the router's score: they agree from two on.
    """
    names = (key, *["norm_topk_prob"] * has_key)

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        normalizes = bool(theirs.get("norm_topk_prob", is_normalized)) if has_key else is_normalized
        if normalizes and theirs.get(key) == 1:
            raise ConfigError(f"{key} = 1 with weights divided by their sum: its weight would always be 1")
        return {"normalize_expert_weights": normalizes}

    def write(model: ModelConfig) -> dict[str, Any]:
        if model.normalize_expert_weights and model.experts_per_token == 1:
            reason = "the weight of one is here its score, and there 1; model.normalize_expert_weights = False agrees"
            raise ConfigError(f"model.experts_per_token = 1: {reason}")
        return {"norm_topk_prob": model.normalize_expert_weights} if has_key else {}

    return Translation(names, read, write)


def only_false(*keys: str) -> Translation:
    """Returns the refusal of switches that make another model, which may be None too."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        if wrong := [f"{key} = {shown(theirs[key])}" for key in keys if theirs.get(key)]:
            raise ConfigError(f"{', '.join(wrong)}: only False is read")
        return {}

    return Translation(keys, read, lambda model: dict.fromkeys(keys, False))

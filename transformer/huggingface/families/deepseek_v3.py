"""DeepSeek-V3's layout (arXiv:2412.19437): latent attention, dense layers first, then experts chosen among those of some groups.

The planes of its rotary positions are neighbours, (0, 1), (2, 3), ...; ours, and most others', are half a head apart.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.families import llama
from transformer.huggingface.families import rotary as spelling
from transformer.huggingface.families.decoders import (
    PROJECTIONS,
    dense_width,
    experts,
    several_experts,
    with_defaults,
    without,
)
from transformer.huggingface.families.layers import Aspect, layers, whole_number
from transformer.huggingface.families.llama import LAYER
from transformer.huggingface.header import shown
from transformer.huggingface.table import Family, Key, Line, Part, Translation, linear, norm
from transformer.huggingface.translation import BIAS_RATE

LATENT_EPSILON = 1e-6
"""transformers adds it in the norms of latents, whatever `rms_norm_eps` says."""


def _planes(width: int) -> np.ndarray:
    """Returns the places of the first entries of all planes, then those of the second ones."""
    return np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])


def _shared_key(model: ModelConfig) -> np.ndarray:
    return _planes(model.rotary_head_width)


def _queries(model: ModelConfig) -> np.ndarray:
    """Of each head first the part without positions."""
    head = np.concatenate([np.arange(model.head_dim), model.head_dim + _planes(model.rotary_head_width)])
    return (np.arange(model.num_heads)[:, None] * len(head) + head).reshape(-1)


MIXER, THEIRS = f"{LAYER}/mixer", "layers.{layer}.self_attn"

ATTENTION = (
    *linear(f"{THEIRS}.q_a_proj", f"{MIXER}/query_latent"),
    *norm(f"{THEIRS}.q_a_layernorm", f"{MIXER}/query_norm"),
    *(
        Line(
            f"{THEIRS}.{name}.weight",
            Part(f"{MIXER}/query/kernel", _queries),
            transposed=True,
            when=lambda model, has_latent=has_latent: (model.query_latent_width is not None) == has_latent,
        )
        for name, has_latent in (("q_b_proj", True), ("q_proj", False))
    ),
    Line(
        f"{THEIRS}.kv_a_proj_with_mqa.weight",
        (f"{MIXER}/latent/kernel", Part(f"{MIXER}/rotary_key/kernel", _shared_key)),
        transposed=True,
    ),
    *norm(f"{THEIRS}.kv_a_layernorm", f"{MIXER}/latent_norm"),
    Line(
        f"{THEIRS}.kv_b_proj.weight",
        (f"{MIXER}/key/kernel", f"{MIXER}/value/kernel"),
        transposed=True,
        groups="num_heads",
    ),
    *linear(f"{THEIRS}.o_proj", f"{MIXER}/output"),
)

EXPERTS = (
    *experts("mlp.gate", "mlp.experts", PROJECTIONS),
    Line("layers.{layer}.mlp.gate.e_score_correction_bias", f"{LAYER}/feedforward/router/bias"),
    *(
        Line(f"layers.{{layer}}.mlp.shared_experts.{theirs}.weight", f"{LAYER}/feedforward/shared/{name}/kernel", True)
        for name, theirs in PROJECTIONS.items()
    ),
)


def _stretch(factor: float, share: float) -> float:
    """YaRN's factor of what attention compares (Peng et al. 2023, arXiv:2309.00071, equation 22)."""
    return 0.1 * share * math.log(factor) + 1 if factor > 1 else 1.0


def _read_rotary(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN's `mscale_all_dim` is a factor of all products of queries and keys, `mscale` over it one of the rotary part."""
    said = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise ConfigError(f"rope_scaling = {shown(said)} is not an object")
    own = {key: said.get(key) for key in ("mscale", "mscale_all_dim")}
    own["attention_factor"] = said.get("attention_factor")
    rest = {key: value for key, value in said.items() if key not in own}
    ours = spelling.read({**theirs, "rope_parameters": rest, "rope_scaling": None}, 10_000.0)
    given = {key: value for key, value in own.items() if value is not None}
    if wrong := [f"{key} = {shown(value)}" for key, value in given.items() if type(value) not in (int, float)]:
        raise ConfigError(f"rope_scaling: {', '.join(wrong)}: must be a number")
    if not given:
        return ours
    if ours["rotary_scaling"] != "yarn":
        raise ConfigError(
            f"rope_scaling.{next(iter(given))} = {shown(next(iter(given.values())))} is read with 'yarn' alone"
        )
    factor, whole = float(ours["rotary_factor"]), float(own["mscale_all_dim"] or 0)
    if own["attention_factor"] is not None:
        ours["rotary_attention_factor"] = float(own["attention_factor"])
    elif own["mscale"] and whole:
        ours["rotary_attention_factor"] = _stretch(factor, float(own["mscale"])) / _stretch(factor, whole)
    if whole:
        widths = [whole_number(theirs, key, default, 1) for key, default in _WIDTHS.items()]
        ours["attention_scale"] = _stretch(factor, whole) ** 2 / math.sqrt(sum(widths))
    return ours


_WIDTHS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64}


def _write_rotary(model: ModelConfig) -> dict[str, Any]:
    theirs, plain = spelling.write(model), 1 / math.sqrt(model.head_dim + model.rotary_head_width)
    assert model.attention_scale is not None, "canonical"
    ratio = model.attention_scale / plain
    if model.rotary_scaling != "yarn" or model.rotary_factor <= 1:
        if not math.isclose(ratio, 1, rel_tol=1e-12):
            raise ConfigError(f"model.attention_scale = {model.attention_scale}: without YaRN it must be {plain}")
        return theirs
    unit, own, stretched = 0.1 * math.log(model.rotary_factor), model.rotary_attention_factor or 1.0, math.sqrt(ratio)
    # Both were made of numbers with few digits, which rounding brings back.
    whole, share = (round((value - 1) / unit, 9) for value in (stretched, own * stretched))
    if whole and share:
        theirs["rope_scaling"] |= {"mscale": share, "mscale_all_dim": whole}
    else:
        theirs["rope_scaling"] |= {"attention_factor": own} | ({"mscale_all_dim": whole} if whole else {})
    return theirs


def _read_heads(theirs: Mapping[str, Any]) -> dict[str, Any]:
    head, value = (theirs.get(key, 128) for key in ("qk_nope_head_dim", "v_head_dim"))
    if head != value:
        same = "keys, but for their rotary part, and values must be equally wide"
        raise ConfigError(f"qk_nope_head_dim = {shown(head)} with v_head_dim = {shown(value)}: {same}")
    return {"head_width": head}


def _write_heads(model: ModelConfig) -> dict[str, Any]:
    return {"qk_nope_head_dim": model.head_dim, "v_head_dim": model.head_dim}


def _read_epsilon(theirs: Mapping[str, Any]) -> dict[str, Any]:
    epsilon = theirs.get("rms_norm_eps", LATENT_EPSILON)
    if epsilon != LATENT_EPSILON:
        reason = f"transformers' norms of latents add {LATENT_EPSILON} all the same, and here all norms add one number"
        raise ConfigError(f"rms_norm_eps = {shown(epsilon)}: {reason}")
    return {"norm_epsilon": epsilon}


def _write_epsilon(model: ModelConfig) -> dict[str, Any]:
    if model.norm_epsilon != LATENT_EPSILON:
        raise ConfigError(
            f"model.norm_epsilon = {model.norm_epsilon}: transformers' norms of latents add {LATENT_EPSILON}"
        )
    return {"rms_norm_eps": model.norm_epsilon}


def _read_experts(theirs: Mapping[str, Any], depth: int) -> tuple[Sequence[bool], dict[str, Any]]:
    first = whole_number(theirs, "first_k_dense_replace", 3)
    return [layer >= first for layer in range(depth)], {}


def _write_experts(model: ModelConfig, flags: Sequence[bool]) -> dict[str, Any]:
    first = len(flags) - sum(flags)
    if any(flags[:first]):
        raise ConfigError(f"model.layers = {model.layers!r}: once a layer has experts, all after it must")
    return {"first_k_dense_replace": first}


def _future(model: ModelConfig, name: str) -> str | None:
    """Published checkpoints have layers after the last, which predict further tokens."""
    match = re.match(r"(?:model\.)?layers\.(\d+)\.", name)
    if match is None or int(match[1]) < model.num_layers:
        return None
    return "they predict tokens after the next (num_nextn_predict_layers), which transformers' own model leaves out too"


FAMILY = Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    prefix="model.",
    lines=(*llama.ENDS, *llama.PRE_NORMS, *ATTENTION, *llama.MLP, *EXPERTS),
    keys=(
        *with_defaults(
            without(llama.FAMILY.keys, "head_dim", "intermediate_size", "rms_norm_eps"),
            vocab_size=129280,
            hidden_size=7168,
            num_hidden_layers=61,
            num_attention_heads=128,
            num_key_value_heads=128,
            max_position_embeddings=4096,
        ),
        Key("kv_lora_rank", "latent_width", 512),
        Key("q_lora_rank", "query_latent_width", 1536),
        Key("qk_rope_head_dim", "rotary_head_width", 64),
        Key("moe_intermediate_size", "expert_width", 2048),
        Key("n_routed_experts", "num_experts", 256),
        Key("n_shared_experts", "num_shared_experts", 1),
        Key("num_experts_per_tok", "experts_per_token", 8),
        Key("n_group", "num_expert_groups", 8),
        Key("topk_group", "groups_per_token", 4),
        Key("routed_scaling_factor", "expert_scale", 2.5),
    ),
    constants={"norm": "rmsnorm", "router_score": "sigmoid", "balance_bias_rate": BIAS_RATE},
    translations=(
        Translation(
            ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor", *_WIDTHS),
            _read_rotary,
            _write_rotary,
        ),
        Translation(("qk_nope_head_dim", "v_head_dim"), _read_heads, _write_heads),
        Translation(("rms_norm_eps",), _read_epsilon, _write_epsilon),
        dense_width(18432),
        several_experts("num_experts_per_tok", True),
        layers(
            61, Aspect("experts", ("first_k_dense_replace",), _read_experts, _write_experts), mixer="latent_attention"
        ),
        Translation(("num_nextn_predict_layers",), lambda theirs: {}, lambda model: {"num_nextn_predict_layers": 0}),
    ),
    fixed={
        "attention_bias": False,
        "rope_interleave": True,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
    },
    harmless=("head_dim", "qk_head_dim", "ep_size", "aux_loss_alpha", "seq_aux", "output_router_logits"),
    repeats=llama.FAMILY.repeats,
    left_out=_future,
)

"""What config.json says of small decoders of families after Llama: a line for the default suite, and more for the slow test."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB = 97

_BASE = {
    **{"vocab_size": VOCAB, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 3},
    **{"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "max_position_embeddings": 64},
}
_QWEN2 = _BASE | {"model_type": "qwen2", "num_attention_heads": 5, "num_key_value_heads": 1}
_QWEN3 = _BASE | {"model_type": "qwen3", "rope_theta": 1000.0}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "num_experts": 5,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
}
_GEMMA2 = _BASE | {"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 10, "pad_token_id": None}
_GEMMA2 |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
_GEMMA3 = _GEMMA2 | {"model_type": "gemma3_text", "attn_logit_softcapping": None, "final_logit_softcapping": None}
_LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0}
_LOCAL = {"rope_type": "default", "rope_theta": 30.0}
_OLMO2 = _BASE | {"model_type": "olmo2", "pad_token_id": None, "eos_token_id": None}
_SMOLLM3 = _BASE | {"model_type": "smollm3", "pad_token_id": None, "bos_token_id": 1, "eos_token_id": None}
_SMOLLM3 |= {"num_attention_heads": 3, "num_key_value_heads": 1}
_MIXTRAL = _BASE | {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 14}
_DEEPSEEK = {
    **{"model_type": "deepseek_v3", "vocab_size": VOCAB, "hidden_size": 30, "intermediate_size": 44},
    **{"num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 64},
    **{"kv_lora_rank": 8, "q_lora_rank": 9, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6},
    **{"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3, "moe_intermediate_size": 10},
    **{"first_k_dense_replace": 1, "n_shared_experts": 2},
}


def _yarn(**more: float) -> dict[str, Any]:
    return {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            **more,
        }
    }


_PER_TYPE = {"rope_parameters": {"full_attention": _LINEAR, "sliding_attention": _LOCAL}}

_TWO = {"num_hidden_layers": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2-windows": _QWEN2 | _WINDOWS | _TWO,
    "qwen3": _QWEN3 | _TWO,
    "qwen3_moe-mixed": _QWEN3_MOE | {"mlp_only_layers": [1]} | _TWO,
    "gemma2": _GEMMA2 | _TWO,
    "gemma3-linear": _GEMMA3 | _PER_TYPE | {"sliding_window_pattern": 2},
    "olmo2": _OLMO2 | _TWO,
    "smollm3": _SMOLLM3 | {"no_rope_layer_interval": 2} | _TWO,
    "mixtral": _MIXTRAL | _TWO,
    "deepseek_v3-yarn": _DEEPSEEK | _yarn(mscale=1.0, mscale_all_dim=0.5) | _TWO,
}

MORE: dict[str, dict[str, Any]] = {
    "qwen2": _QWEN2 | {"tie_word_embeddings": True},
    "qwen2-yarn": _QWEN2 | _yarn(),
    "qwen3-windows": _QWEN3 | _WINDOWS | {"attention_bias": True, "tie_word_embeddings": True},
    "qwen3_moe": _QWEN3_MOE | {"norm_topk_prob": True},
    "qwen3_moe-step": _QWEN3_MOE
    | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6},
    "qwen3_moe-one": _QWEN3_MOE | {"num_experts_per_tok": 1},
    "gemma2-free-head": _GEMMA2
    | {"tie_word_embeddings": False, "attn_logit_softcapping": None, "attention_bias": True},
    "gemma3": _GEMMA3 | {"num_hidden_layers": 8, "final_logit_softcapping": 4.0},
    "olmo2-biases": _OLMO2 | {"attention_bias": True, "num_key_value_heads": 6, "tie_word_embeddings": True},
    "smollm3-windows": _SMOLLM3
    | {
        "use_sliding_window": True,
        "sliding_window": 4,
        "no_rope_layers": [0, 1, 0],
        "mlp_bias": True,
        "attention_bias": True,
    }
    | {"tie_word_embeddings": False},
    "mixtral-window": _MIXTRAL | {"sliding_window": 4, "num_experts_per_tok": 3, "tie_word_embeddings": True},
    "deepseek_v3": _DEEPSEEK | {"q_lora_rank": None, "norm_topk_prob": False, "first_k_dense_replace": 2},
    "deepseek_v3-factor": _DEEPSEEK | _yarn(mscale=0.7, mscale_all_dim=1.3) | {"n_group": 1, "topk_group": 1},
    "deepseek_v3-plain-yarn": _DEEPSEEK | _yarn() | {"first_k_dense_replace": 0, "tie_word_embeddings": True},
}


def from_files(config: Mapping[str, Any], seed: int) -> tuple[Any, dict[str, list[int]]]:
    """Returns transformers' model, read from files with the weights of the seed, and the shapes in those files.

    In memory transformers joins the matrices of experts, and in files, as published, each is a tensor of its own.
    """
    import transformers
    from references import write_folder
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as place:
        made = transformers.AutoConfig.for_model(**config)
        transformers.AutoModelForCausalLM.from_config(made).save_pretrained(place)
        with safe_open(Path(place) / "model.safetensors", "np") as file:
            names = file.keys()  # it is no mapping, and cannot be gone through itself
            shapes = {name: list(file.get_slice(name).get_shape()) for name in names}
        write_folder(Path(place), json.loads((Path(place) / "config.json").read_text()), shapes, seed)
        # Its fused product of experts takes only widths that are multiples of four.
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_pretrained(place, **eager)
    model.generation_config.eos_token_id = None
    return model.eval(), shapes

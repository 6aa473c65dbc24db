"""Llama 1, 2, 3 and 3.x (Touvron et al. 2023, arXiv:2302.13971; Grattafiori et al. 2024, arXiv:2407.21783)."""

from transformer.huggingface.families.biases import biases
from transformer.huggingface.families.rotary import rotary
from transformer.huggingface.table import Family, Key, Line, linear, norm

LAYER = "decoder/layers"

ATTENTION = (
    *(
        line
        for name in "qkv"
        for line in linear(
            f"layers.{{layer}}.self_attn.{name}_proj", f"{LAYER}/mixer/{dict(q='query', k='key', v='value')[name]}"
        )
    ),
    *linear("layers.{layer}.self_attn.o_proj", f"{LAYER}/mixer/output"),
)
MLP = tuple(
    line
    for name in ("gate", "up", "down")
    for line in linear(f"layers.{{layer}}.mlp.{name}_proj", f"{LAYER}/feedforward/{name}")
)
ENDS = (
    Line("embed_tokens.weight", "embedding"),
    *norm("norm", "decoder/final_norm"),
    Line("lm_head.weight", "head"),
)
PRE_NORMS = (
    *norm("layers.{layer}.input_layernorm", f"{LAYER}/mixer_norm"),
    *norm("layers.{layer}.post_attention_layernorm", f"{LAYER}/feedforward_norm"),
)

ACTIVATION = Key(
    "hidden_act",
    "activation",
    "silu",
    {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu", "relu": "reglu"},
)
"""Of gated MLPs."""

SIZES = (
    Key("vocab_size", "vocab_size", 32000),
    Key("max_position_embeddings", "num_positions", 2048),
    Key("hidden_size", "width", 4096),
    Key("num_hidden_layers", "num_layers", 32),
    Key("num_attention_heads", "num_heads", 32),
    Key("num_key_value_heads", "num_kv_heads", None),
    Key("head_dim", "head_width", None),
    Key("intermediate_size", "feedforward_width", 11008),
)


FAMILY = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    lines=(*ENDS, *PRE_NORMS, *ATTENTION, *MLP),
    keys=(
        *SIZES,
        ACTIVATION,
        Key("rms_norm_eps", "norm_epsilon", 1e-6),
        Key("tie_word_embeddings", "tied_embeddings", False),
    ),
    constants={"norm": "rmsnorm", "layers": "attention"},
    translations=(rotary(), biases(has_mlp=True)),
    repeats={"lm_head.weight": "model.embed_tokens.weight"},
    ignored=(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

"""GPT-2 (Radford et al. 2019). Its linear maps are stored as Conv1D, inputs first, and one holds query, key and value."""

from transformer.huggingface.table import Family, Key, Line, norm


def _conv1d(theirs: str, *ours: str) -> tuple[Line, Line]:
    kernels, biases = (tuple(f"{path}/{name}" for path in ours) for name in ("kernel", "bias"))
    return Line(f"{theirs}.weight", kernels, axis=1), Line(f"{theirs}.bias", biases)


LAYER = "decoder/layers"

FAMILY = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    lines=(
        Line("wte.weight", "embedding"),
        Line("wpe.weight", "positions"),
        *norm("h.{layer}.ln_1", f"{LAYER}/mixer_norm"),
        *_conv1d("h.{layer}.attn.c_attn", *(f"{LAYER}/mixer/{name}" for name in ("query", "key", "value"))),
        *_conv1d("h.{layer}.attn.c_proj", f"{LAYER}/mixer/output"),
        *norm("h.{layer}.ln_2", f"{LAYER}/feedforward_norm"),
        *_conv1d("h.{layer}.mlp.c_fc", f"{LAYER}/feedforward/up"),
        *_conv1d("h.{layer}.mlp.c_proj", f"{LAYER}/feedforward/down"),
        *norm("ln_f", "decoder/final_norm"),
        Line("lm_head.weight", "head"),
    ),
    keys=(
        Key("vocab_size", "vocab_size", 50257),
        Key("n_positions", "num_positions", 1024),
        Key("n_embd", "width", 768),
        Key("n_layer", "num_layers", 12),
        Key("n_head", "num_heads", 12),
        Key("n_inner", "feedforward_width", None),
        Key(
            "activation_function",
            "activation",
            "gelu_new",
            {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact", "relu": "relu", "silu": "silu"},
        ),
        Key("layer_norm_epsilon", "norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "tied_embeddings", True),
    ),
    constants={"biases": True, "positions": "learned", "norm": "layernorm"},
    fixed={
        "add_cross_attention": False,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
    },
    harmless=("n_ctx", "reorder_and_upcast_attn", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    repeats={"lm_head.weight": "transformer.wte.weight"},
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),
)

"""T5 (Raffel et al. 2020, arXiv:1910.10683) in its first form and as version 1.1 (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.folder import same
from transformer.huggingface.header import shown
from transformer.huggingface.table import Family, Key, Line, Translation

ACTIVATIONS = {
    **{"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu", "gated-relu": "reglu", "gelu": "gelu_exact"},
    **{"gelu_new": "gelu", "silu": "silu", "gated-gelu_new": "geglu"},
}


def _stack(name: str, sublayers: tuple[tuple[str, str], ...]) -> tuple[Line, ...]:
    """Returns the lines of the encoder or the decoder, whose sublayers of attention are numbered in this order."""
    ours, theirs = f"{name}/layers", f"{name}.block.{{layer}}.layer"
    lines = [Line(f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{name}/bias/table")]
    for number, (attention, part) in enumerate(sublayers):
        lines.append(Line(f"{theirs}.{number}.layer_norm.weight", f"{ours}/{part}_norm/scale"))
        for letter, kernel in zip("qkvo", ("query", "key", "value", "output"), strict=True):
            their_name, our_path = f"{theirs}.{number}.{attention}.{letter}.weight", f"{ours}/{part}/{kernel}/kernel"
            lines.append(Line(their_name, our_path, transposed=True))
    last = f"{theirs}.{len(sublayers)}"
    lines.append(Line(f"{last}.layer_norm.weight", f"{ours}/feedforward_norm/scale"))
    return (*lines, Line(f"{name}.final_layer_norm.weight", f"{name}/final_norm/scale"))


def _is_plain(model: ModelConfig) -> bool:
    return not model.gated


def _is_gated(model: ModelConfig) -> bool:
    return model.gated


def _mlp(name: str, number: int) -> tuple[Line, ...]:
    """Returns the lines of the MLP, whose first map has another name where there is a gate beside it."""
    theirs, ours = f"{name}.block.{{layer}}.layer.{number}.DenseReluDense", f"{name}/layers/feedforward"
    return (
        Line(f"{theirs}.wi.weight", f"{ours}/up/kernel", transposed=True, when=_is_plain),
        Line(f"{theirs}.wi_0.weight", f"{ours}/gate/kernel", transposed=True),
        Line(f"{theirs}.wi_1.weight", f"{ours}/up/kernel", transposed=True, when=_is_gated),
        Line(f"{theirs}.wo.weight", f"{ours}/down/kernel", transposed=True),
    )


def depths(default: int) -> Translation:
    """Returns the depth of the encoder, which is the decoder's too unless that has one of its own."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        encoder, decoder = theirs.get("num_layers", default), theirs.get("num_decoder_layers")
        return {"num_encoder_layers": encoder, "num_layers": encoder if decoder is None else decoder}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"num_layers": model.encoder_depth, "num_decoder_layers": model.num_layers}

    return Translation(("num_layers", "num_decoder_layers"), read, write)


def derived(default: str) -> Translation:
    """Returns what transformers derives from `feed_forward_proj`, and writes besides: it must agree."""

    def read(theirs: Mapping[str, Any]) -> dict[str, Any]:
        kind = str(theirs.get("feed_forward_proj", default))
        gated, _, name = kind.rpartition("-")
        known = {"dense_act_fn": "gelu_new" if kind == "gated-gelu" else name, "is_gated_act": gated == "gated"}
        wrong = [f"{key} = {shown(theirs[key])}" for key, value in known.items() if theirs.get(key, value) != value]
        if wrong:
            told = f"{' and '.join(wrong)} with feed_forward_proj = {shown(kind)}"
            raise ConfigError(f"{told}: they must say the same")
        return {}

    return Translation(("dense_act_fn", "is_gated_act"), read, lambda model: {})


def _read_scale(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The first T5 divides what goes into its tied head, as long as config.json does not deny that it is tied."""
    scaled, width = (
        theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False),
        theirs.get("d_model", 512),
    )
    return {"logit_scale": width**-0.5 if scaled and isinstance(width, int) and width > 0 else 1.0}


def _write_scale(model: ModelConfig) -> dict[str, Any]:
    if model.logit_scale not in (1.0, model.width**-0.5):
        raise ConfigError(
            f"model.logit_scale = {model.logit_scale}: t5 has 1.0 and {model.width**-0.5}, 1 / sqrt(width)"
        )
    return {"scale_decoder_outputs": model.logit_scale != 1.0}


def told_by_tensors(theirs: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 says of every T5 that its head is tied, and then takes the one that is there, if it differs."""
    head = tensors.get("lm_head.weight")
    tied = head is None or same(head, tensors.get("shared.weight"))
    scaled = theirs.get("scale_decoder_outputs", theirs.get("tie_word_embeddings") is not False)
    return {**theirs, "tie_word_embeddings": tied, "scale_decoder_outputs": scaled}


CONSTANTS = {
    "architecture": "encoder_decoder",
    "layers": "attention",
    "norm": "rmsnorm",
    "positions": "relative",
    "attention_scale": 1.0,
}

KEYS = (
    Key("vocab_size", "vocab_size", 32128),
    Key("d_model", "width", 512),
    Key("d_kv", "head_width", 64),
    Key("d_ff", "feedforward_width", 2048),
    Key("num_heads", "num_heads", 8),
    Key("relative_attention_num_buckets", "num_relative_buckets", 32),
    Key("relative_attention_max_distance", "max_relative_distance", 128),
    Key("layer_norm_epsilon", "norm_epsilon", 1e-6),
    Key("feed_forward_proj", "activation", "relu", ACTIVATIONS),
    Key("tie_word_embeddings", "tied_embeddings", True),
    Key("decoder_start_token_id", "decoder_start_token", 0),
)

REPEATS = {
    name: "shared.weight" for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
}

FAMILY = Family(
    model_type="t5",
    architecture="T5ForConditionalGeneration",
    lines=(
        Line("shared.weight", "embedding"),
        *_stack("encoder", (("SelfAttention", "mixer"),)),
        *_mlp("encoder", 1),
        *_stack("decoder", (("SelfAttention", "mixer"), ("EncDecAttention", "cross"))),
        *_mlp("decoder", 2),
        Line("lm_head.weight", "head"),
    ),
    keys=KEYS,
    constants=CONSTANTS,
    translations=(depths(6), derived("relu"), Translation(("scale_decoder_outputs",), _read_scale, _write_scale)),
    fixed={"is_decoder": False, "is_encoder_decoder": True},
    harmless=("dropout_rate", "classifier_dropout", "initializer_factor", "n_positions"),
    repeats=REPEATS,
    # Cross-attention of the first T5's files has a table that was never used.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    told_by_tensors=told_by_tensors,
)

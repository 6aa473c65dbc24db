"""BERT (Devlin et al. 2019, arXiv:1810.04805) and its smaller ones, such as MiniLM: the encoder alone, with the head for
masked tokens, or with one for labels. The head that tells whether a sentence follows is left out."""

from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.header import shown
from transformer.huggingface.table import Family, Key, Line, Translation, linear, norm

LAYER = "encoder/layers"

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu", "silu": "silu"}

MASKED = {"head_transform": True, "head_bias": True}

HEADS: dict[str, dict[str, Any]] = {
    "BertModel": {"pooler": True},
    "BertForMaskedLM": MASKED,
    "BertForPreTraining": MASKED | {"pooler": True},
    "BertForSequenceClassification": {"pooler": True},
    "BertForTokenClassification": {},
}
"""What each class of transformers has beside the encoder."""


def _head_of(theirs: Mapping[str, Any]) -> str:
    found = theirs.get("architectures") or ["BertModel"]
    if not isinstance(found, list) or len(found) != 1 or not isinstance(found[0], str) or found[0] not in HEADS:
        raise ConfigError(f"architectures = {shown(found)} is none of {', '.join(HEADS)}")
    return found[0]


def _read_head(theirs: Mapping[str, Any]) -> dict[str, Any]:
    name = _head_of(theirs)
    ours = {"head_transform": False, "head_bias": False, "pooler": False, **HEADS[name]}
    if "add_pooling_layer" in theirs:
        ours["pooler"] = theirs["add_pooling_layer"]
    if name.endswith("Classification"):
        labels = theirs.get("id2label")
        ours["num_labels"] = len(labels) if isinstance(labels, dict) else theirs.get("num_labels", 2)
    return ours


def _write_head(model: ModelConfig) -> dict[str, Any]:
    if model.num_labels:
        name = "BertForSequenceClassification" if model.pooler else "BertForTokenClassification"
        labels = {str(number): f"LABEL_{number}" for number in range(model.num_labels)}
        return {"architectures": [name], "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}
    if model.head_transform != model.head_bias:
        keys = f"model.head_transform = {model.head_transform} with model.head_bias = {model.head_bias}"
        raise ConfigError(f"{keys}: bert has both or none")
    if model.head_transform:
        return {"architectures": ["BertForMaskedLM"], "add_pooling_layer": model.pooler}
    return {"architectures": ["BertModel"], "add_pooling_layer": model.pooler}


def _told_by_tensors(theirs: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A class that does not use the pooler may have been saved with it, and one that does without; some files name none."""
    has_pooler = any(name.endswith("pooler.dense.weight") for name in tensors)
    name = "BertForMaskedLM" if "cls.predictions.bias" in tensors else "BertModel"
    if "classifier.weight" in tensors:
        name = "BertForSequenceClassification" if has_pooler else "BertForTokenClassification"
    return {"architectures": [name], "add_pooling_layer": has_pooler, **theirs}


FAMILY = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    prefix="bert.",
    lines=(
        Line("embeddings.word_embeddings.weight", "embedding"),
        Line("embeddings.position_embeddings.weight", "positions"),
        Line("embeddings.token_type_embeddings.weight", "token_types"),
        *norm("embeddings.LayerNorm", "embedding_norm"),
        *(
            line
            for name in ("query", "key", "value")
            for line in linear(f"encoder.layer.{{layer}}.attention.self.{name}", f"{LAYER}/mixer/{name}")
        ),
        *linear("encoder.layer.{layer}.attention.output.dense", f"{LAYER}/mixer/output"),
        *norm("encoder.layer.{layer}.attention.output.LayerNorm", f"{LAYER}/mixer_norm"),
        *linear("encoder.layer.{layer}.intermediate.dense", f"{LAYER}/feedforward/up"),
        *linear("encoder.layer.{layer}.output.dense", f"{LAYER}/feedforward/down"),
        *norm("encoder.layer.{layer}.output.LayerNorm", f"{LAYER}/feedforward_norm"),
        *linear("pooler.dense", "pooler"),
        *linear("cls.predictions.transform.dense", "head_transform/dense"),
        *norm("cls.predictions.transform.LayerNorm", "head_transform/norm"),
        Line("cls.predictions.bias", "head_bias"),
        *linear("classifier", "classifier"),
    ),
    keys=(
        Key("vocab_size", "vocab_size", 30522),
        Key("hidden_size", "width", 768),
        Key("num_hidden_layers", "num_layers", 12),
        Key("num_attention_heads", "num_heads", 12),
        Key("intermediate_size", "feedforward_width", 3072),
        Key("hidden_act", "activation", "gelu", ACTIVATIONS),
        Key("max_position_embeddings", "num_positions", 512),
        Key("type_vocab_size", "num_token_types", 2),
        Key("layer_norm_eps", "norm_epsilon", 1e-12),
    ),
    constants={
        "architecture": "encoder",
        "layers": "attention",
        "positions": "learned",
        "norm": "layernorm",
        "norm_placement": "post",
        "biases": True,
        "embedding_norm": True,
        "tied_embeddings": True,
    },
    translations=(
        Translation(("architectures", "add_pooling_layer", "id2label", "num_labels"), _read_head, _write_head),
    ),
    # A head that is not tied has two biases in transformers, of which one is used, and which depends on the release.
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    harmless=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "label2id"),
    repeats={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    ignored=(r"(bert\.)?embeddings\.position_ids", r"cls\.seq_relationship\.(weight|bias)"),
    renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    told_by_tensors=_told_by_tensors,
)

"""Models of other people's code to compare with: weights that need not be stored, and a table of small configurations.

The weights of a reference are made by NumPy from a seed and the tensor's name. So the default suite, which has no torch, needs
only config.json, the shapes, and some logits that transformers gave: `references/NAME.json`, written by

    python tests/huggingface/references.py [NAME ...]

while `test_families_live.py` compares with transformers itself, over seeds, packed and padded.
"""

import json
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import decoder_variants
import numpy as np

REFERENCES = Path(__file__).parent / "references"
COLUMNS = 16
"""Logits that are recorded of each token."""

VOCAB = 97

_LLAMA = {
    **{"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 30, "intermediate_size": 44, "num_hidden_layers": 2},
    **{"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 96},
}
_MISTRAL = _LLAMA | {"model_type": "mistral", "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
_GPT2 = {"model_type": "gpt2", "vocab_size": VOCAB, "n_embd": 30, "n_layer": 2, "n_head": 5, "n_positions": 96}
_BERT = {
    **{"model_type": "bert", "vocab_size": VOCAB, "hidden_size": 30, "num_hidden_layers": 2, "num_attention_heads": 5},
    **{"intermediate_size": 44, "max_position_embeddings": 64},
}
_T5 = {
    **{"model_type": "t5", "vocab_size": VOCAB, "d_model": 30, "d_kv": 4, "d_ff": 44, "num_heads": 5, "num_layers": 1},
    **{"num_decoder_layers": 2, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12},
    "decoder_start_token_id": 0,
}
_V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def _rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 500.0, "factor": 4.0, **more}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama-tied-biases": _LLAMA
    | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 5},
    "llama-llama3": _LLAMA | _rope("llama3", **_LLAMA3),
    "llama-linear": _LLAMA | _rope("linear"),
    "llama-yarn": _LLAMA | _rope("yarn", original_max_position_embeddings=16),
    "mistral": _MISTRAL | {"sliding_window": 5},
    "mistral-no-window": _MISTRAL | {"sliding_window": None, "rms_norm_eps": 1e-3},
    "gpt2": _GPT2,
    "gpt2-free-head": _GPT2 | {"tie_word_embeddings": False, "n_inner": 50, "activation_function": "gelu"},
    **decoder_variants.VARIANTS,
    "bert": _BERT,
    "bert-model": _BERT | {"architectures": ["BertModel"], "hidden_act": "gelu_new", "type_vocab_size": 3},
    "bert-labels": _BERT | {"architectures": ["BertForSequenceClassification"], "num_labels": 3},
    "t5": _T5,
    "t5-v1.1": _T5 | _V11,
    "mt5": _T5 | _V11 | {"model_type": "mt5", "num_layers": 2, "num_decoder_layers": None},
}
"""What config.json says of small models: a line, or a few, for each family."""

CLASSES: dict[str, str] = {
    "bert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
    "mt5": "AutoModelForSeq2SeqLM",
}
"""transformers' Auto class by model_type, where it is not AutoModelForCausalLM; a variant may name its own."""


def weight(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """Returns the values of a tensor."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(0, 0.3, shape).astype(np.float32)


def texts(seed: int, vocab: int = VOCAB) -> list[np.ndarray]:
    """Returns token ids of texts of unequal lengths."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, vocab, length) for length in (23, 9, 14)]


def write_folder(path: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], seed: int) -> None:
    """Writes a checkpoint as another library would."""
    from safetensors.numpy import save_file

    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: weight(name, shape, seed) for name, shape in shapes.items()}, path / "model.safetensors")


def their_model(config: Mapping[str, Any], seed: int) -> Any:
    """Returns transformers' model of a configuration, with the weights of the seed."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers

    made = transformers.AutoConfig.for_model(**config)
    made.bos_token_id, made.eos_token_id = 1, None
    if "architectures" in config:
        model = getattr(transformers, config["architectures"][0])._from_config(made, attn_implementation="eager").eval()
    else:
        kind = getattr(transformers, CLASSES.get(config["model_type"], "AutoModelForCausalLM"))
        # Its fused product of experts takes only widths that are multiples of four.
        eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = kind.from_config(made, **eager).eval()
    head = model.get_output_embeddings()
    if config.get("tie_word_embeddings") is False and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.clone())  # which transformers 5 ties in every T5 that it makes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weight(name, parameter.shape, seed)))
    return model


def their_logits(model: Any, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns float32 logits of each text by itself, hidden states of a model without a head. Of an encoder-decoder the text
    is what is written, and what is read is the text backwards."""
    import torch  # pyright: ignore[reportMissingImports]

    def outputs(text: np.ndarray) -> Any:
        if not model.config.is_encoder_decoder:
            return model(torch.from_numpy(text)[None])
        both = (torch.from_numpy(part.copy())[None] for part in (text[::-1], text))
        return model(input_ids=next(both), decoder_input_ids=next(both))

    with torch.no_grad():
        found = [outputs(text) for text in ids]
    arrays = [(one.logits if "logits" in one else one.last_hidden_state).numpy() for one in found]
    return [array if array.ndim == 2 else array[0] for array in arrays]


def record(name: str) -> None:
    """Writes what the default suite compares with."""
    if name in decoder_variants.VARIANTS:
        model, shapes = decoder_variants.from_files(VARIANTS[name], 0)
    else:
        model = their_model(VARIANTS[name], 0)
        shapes = {key: list(value.shape) for key, value in model.named_parameters()}
    logits = their_logits(model, texts(0))
    found = {
        "config": json.loads(model.config.to_json_string()),
        "shapes": shapes,
        "logits": [[[round(float(x), 6) for x in row[:COLUMNS]] for row in text] for text in logits],
    }
    REFERENCES.mkdir(exist_ok=True)
    (REFERENCES / f"{name}.json").write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VARIANTS:
        record(chosen)

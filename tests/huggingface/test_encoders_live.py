"""BERT and T5 beside transformers' own: every head, types of tokens, padded and packed texts, and what is written back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from logits import mesh_of
from references import VARIANTS, VOCAB, their_model

from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.writing import write
from transformer.inference.generate import prefill
from transformer.models.parameters import bind
from transformer.models.transformer import Transformer, apply

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

LENGTHS = (17, 5, 11, 2)

HEADS = {
    "BertModel": {},
    "BertForMaskedLM": {},
    "BertForPreTraining": {"hidden_act": "relu"},
    "BertForSequenceClassification": {"num_labels": 3},
    "BertForTokenClassification": {"num_labels": 5},
    "BertForMaskedLM, three types": {"type_vocab_size": 3, "num_attention_heads": 3},
}


def distance(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def batch_of(seed: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [B, T] and which of them are none, of texts that end at different lengths."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (len(lengths), max(lengths)))
    return ids, (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int32)


def columns(ids: np.ndarray, mask: np.ndarray, prefix: str = "") -> dict[str, Any]:
    places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    arrays = {"inputs": ids * mask, "positions": places * mask, "segment_ids": mask}
    return {f"{prefix}{name}": jnp.asarray(array, jnp.int32) for name, array in arrays.items()}


def run(network: Transformer, params: Any, batch: Any, mesh: Any) -> tuple[Any, Any]:
    with jax.set_mesh(mesh):

        @jax.jit
        def both(params: Any, batch: Any) -> Any:
            outputs = apply(network, params, batch)
            return outputs.hidden, outputs.logits(outputs.hidden)

        return both(params, batch)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", HEADS)
def test_bert(name: str, seed: int, tmp_path: Path) -> None:
    """In, on one device and on eight, and out again, where transformers computes the same."""
    kind = name.partition(",")[0]
    theirs = their_model(VARIANTS["bert"] | {"architectures": [kind]} | HEADS[name], seed)
    theirs.save_pretrained(tmp_path / "theirs")
    (ids, mask), types = batch_of(seed), np.random.default_rng(seed + 9).integers(0, 2, (len(LENGTHS), max(LENGTHS)))
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    with torch.no_grad():
        expected = theirs(**{key: torch.from_numpy(np.array(value)) for key, value in given.items()})
    is_token = mask == 1
    mine = None
    for axes in ({}, {"fsdp": 2, "tensor": 1, "replica": 2}):
        mesh = mesh_of(**axes)
        model, params = read(tmp_path / "theirs", mesh)
        network = Transformer(dataclasses.replace(model, scan_layers=False))
        batch = columns(ids, mask) | {"token_types": jnp.asarray(types, jnp.int32)}
        hidden, logits = run(network, params, batch, mesh)
        if kind == "BertModel":
            assert distance(hidden[is_token], expected.last_hidden_state.numpy()[is_token]) < 1e-4
            pooler = bind(network, jax.device_get(params)).pooler
            assert pooler is not None
            pooled = pooler(jnp.asarray(hidden)[:, 0])
            assert distance(pooled, expected.pooler_output.numpy()) < 1e-4
        elif kind == "BertForSequenceClassification":
            assert distance(logits[:, 0], expected.logits.numpy()) < 1e-4
        else:
            found = expected.prediction_logits if kind == "BertForPreTraining" else expected.logits
            found = found.numpy()[is_token]
            assert distance(np.asarray(logits)[is_token][:, : found.shape[-1]], found) < 1e-4
        mine = model, params
    assert mine is not None
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of("bert"), *mine)
    again = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    if kind != "BertForPreTraining":  # whose other head is left out
        assert not again[1]["missing_keys"] and not again[1]["mismatched_keys"]
        with torch.no_grad():
            repeated = again[0].eval()(**{key: torch.from_numpy(np.array(value)) for key, value in given.items()})
        for one, other in zip(repeated.to_tuple(), expected.to_tuple(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "mt5"])
def test_t5(name: str, seed: int, tmp_path: Path) -> None:
    """In, on one device and on eight, and out again; greedily written texts of 64 tokens are the same all three times."""
    theirs = their_model(VARIANTS[name], seed)
    theirs.save_pretrained(tmp_path / "theirs")
    source, read_mask = batch_of(seed)
    target, written = batch_of(seed + 5, (9, 23, 4, 14))
    given = {"input_ids": source, "attention_mask": read_mask, "decoder_input_ids": target}
    with torch.no_grad():
        expected = theirs(**{key: torch.from_numpy(np.array(value)) for key, value in given.items()}).logits.numpy()
    reading = columns(source, read_mask, "encoder_")
    mine = None
    for axes in ({}, {"fsdp": 2, "replica": 2}):
        mesh = mesh_of(**axes)
        model, params = read(tmp_path / "theirs", mesh)
        network = Transformer(dataclasses.replace(model, scan_layers=False))
        logits = run(network, params, columns(target, written) | reading, mesh)[1]
        assert distance(np.asarray(logits)[written == 1][:, :VOCAB], expected[written == 1]) < 1e-4
        mine = model, params
    assert mine is not None
    tokens = greedy(network, jax.device_get(params), reading)
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of(VARIANTS[name]["model_type"]), *mine)
    again, told = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, attn_implementation="eager")
    assert not told["mismatched_keys"] and not told["missing_keys"]
    with torch.no_grad():
        repeated = again.eval()(**{key: torch.from_numpy(np.array(value)) for key, value in given.items()})
    assert np.array_equal(repeated.logits.numpy(), expected)
    for their in (theirs, again):
        their.generation_config.eos_token_id = None
        # Without a cache: that of transformers 5.23 has as many layers as the encoder, which may be fewer than the decoder.
        how = {"max_new_tokens": 64, "do_sample": False, "use_cache": False}
        texts = their.generate(torch.from_numpy(source), attention_mask=torch.from_numpy(read_mask), **how)
        assert texts[:, 0].tolist() == [0] * len(LENGTHS)
        assert np.array_equal(texts[:, 1:].numpy(), tokens)


def greedy(network: Transformer, params: Any, reading: Any, count: int = 64) -> np.ndarray:
    """The most probable token, again and again, with our cache."""
    start = network.config.decoder_start_token
    assert start is not None
    ones = np.ones((len(LENGTHS), 1), np.int32)
    logits, cache = jax.jit(prefill, static_argnums=(0, 3))(
        network, params, columns(start * ones, ones) | reading, count + 1
    )

    @jax.jit
    def step(params: Any, cache: Any, tokens: Any, place: Any) -> Any:
        at = jnp.broadcast_to(place, (len(LENGTHS), 1))
        batch = {"inputs": tokens[:, None], "positions": at, "segment_ids": jnp.ones_like(at)}
        outputs = apply(network, params, batch, cache=cache)
        return outputs.logits(outputs.hidden[:, -1]), outputs.cache

    found = []
    for place in range(count):
        found.append(jnp.argmax(logits, axis=-1))
        logits, cache = step(params, cache, found[-1], jnp.int32(place + 1))
    return np.stack(found, axis=1)


def test_names_of_older_files(tmp_path: Path) -> None:
    """The first BERT: gamma and beta, a head that is stored twice, the head for the next sentence, numbers of positions."""
    from safetensors.torch import load_file, save_file

    theirs = their_model(VARIANTS["bert"] | {"architectures": ["BertForPreTraining"]}, 0)
    theirs.save_pretrained(tmp_path / "new")
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "model.safetensors")
    config = json.loads((tmp_path / "new" / "config.json").read_text()) | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    model, params = read(tmp_path / "new", mesh_of())
    again, same = read(tmp_path / "old", mesh_of())
    assert model == again and model.pooler and jax.tree.all(jax.tree.map(np.array_equal, params, same))

"""What BERT and T5 have that other models have not: embeddings of types, norms of embeddings, what comes before heads."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, ModelConfig, problems_of, replace
from transformer.models.flops import forward_products
from transformer.models.parameters import bind, init_parameters, map_specs, parameter_specs
from transformer.models.transformer import MASKED_LOGIT, Transformer, apply

BERT = ModelConfig(
    architecture="encoder",
    vocab_size=13,
    num_layers=1,
    width=12,
    num_heads=3,
    feedforward_width=16,
    positions="learned",
    num_positions=8,
    norm_placement="post",
    biases=True,
    embedding_norm=True,
    num_token_types=2,
    head_transform=True,
    head_bias=True,
    pooler=True,
    scan_layers=False,
)


def build(**changes: Any) -> tuple[Transformer, Any, dict[str, jax.Array]]:
    """A model whose parameters are all random, biases and norms too, and a batch of 2 texts of 6 tokens."""
    model = Transformer(dataclasses.replace(BERT, **changes))
    rng = np.random.default_rng(0)
    params = map_specs(lambda spec: jnp.asarray(rng.normal(0, 0.5, spec.shape), jnp.float32), parameter_specs(model))
    places = jnp.broadcast_to(jnp.arange(6), (2, 6))
    batch = {"inputs": jnp.asarray(rng.integers(0, 13, (2, 6))), "positions": places}
    return model, params, batch | {"segment_ids": jnp.ones((2, 6), jnp.int32)}


def logits_of(model: Transformer, params: Any, batch: dict[str, jax.Array]) -> np.ndarray:
    outputs = apply(model, params, batch)
    return np.asarray(outputs.logits(outputs.hidden))


def normalized(x: np.ndarray, norm: Any) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])


def test_tokens_are_of_type_0_unless_told_otherwise() -> None:
    model, params, batch = build()
    plain = logits_of(model, params, batch)
    types = jnp.zeros((2, 6), jnp.int32)
    assert np.array_equal(plain, logits_of(model, params, batch | {"token_types": types}))
    changed = logits_of(model, params, batch | {"token_types": types.at[1, 2].set(1)})
    assert np.array_equal(plain[0], changed[0]) and not np.allclose(plain[1, 2], changed[1, 2])
    # As if the embedding of that type were the first.
    other = params | {"token_types": params["token_types"][::-1]}
    assert np.array_equal(logits_of(model, other, batch), logits_of(model, params, batch | {"token_types": types + 1}))


def test_what_comes_before_the_head_is_what_it_says() -> None:
    model, params, batch = build(activation="relu", logit_scale=0.5)
    hidden = np.asarray(apply(model, params, batch).hidden)
    dense = params["head_transform"]["dense"]
    before = normalized(np.maximum(hidden @ dense["kernel"] + dense["bias"], 0), params["head_transform"]["norm"])
    expected = 0.5 * before @ np.asarray(params["embedding"]).T + np.asarray(params["head_bias"])
    logits = logits_of(model, params, batch)
    np.testing.assert_allclose(logits[..., :13], expected[..., :13], rtol=1e-4, atol=1e-5)
    assert np.all(logits[..., 13:] == MASKED_LOGIT)


def test_labels_come_after_the_pooler_and_need_no_head_over_the_vocabulary() -> None:
    model, params, batch = build(num_labels=3)
    assert not {"head_transform", "head_bias", "head"} & set(params)
    hidden = np.asarray(apply(model, params, batch).hidden)
    pooled = np.tanh(hidden @ params["pooler"]["kernel"] + params["pooler"]["bias"])
    expected = pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    np.testing.assert_allclose(logits_of(model, params, batch), expected, rtol=1e-4, atol=1e-5)


def test_the_sum_of_embeddings_is_normalised() -> None:
    """Without a layer that adds anything, the hidden states are that norm, normalised again by the post-norms."""
    model, params, batch = build()
    zero = jax.tree.map(jnp.zeros_like, params["encoder"]["layers"])
    for name in ("mixer_norm", "feedforward_norm"):
        zero[name]["scale"] = jnp.ones_like(zero[name]["scale"])
    params = params | {"encoder": params["encoder"] | {"layers": zero}}
    total = params["embedding"][batch["inputs"]] + params["positions"][batch["positions"]] + params["token_types"][0]
    expected = normalized(np.asarray(total), params["embedding_norm"])
    plain = {"scale": np.ones(12), "bias": np.zeros(12)}
    expected = normalized(normalized(expected, plain), plain)
    np.testing.assert_allclose(apply(model, params, batch).hidden, expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_alone_and_inside_an_encoder_decoder_have_the_same_parameters() -> None:
    """So that one can start from the other: of the same paths, shapes and meaning."""
    alone, params, batch = build(num_layers=2)
    both = Transformer(dataclasses.replace(alone.config, architecture="encoder_decoder"))
    ours, theirs = parameter_specs(alone), parameter_specs(both)
    for name in ("embedding", "positions", "token_types", "embedding_norm", "encoder"):
        shapes = [map_specs(lambda spec: (spec.shape, spec.axes), specs[name]) for specs in (ours, theirs)]
        assert shapes[0] == shapes[1], name
    started = init_parameters(both, jax.random.key(0)) | {name: params[name] for name in params if name in theirs}
    reading = {f"encoder_{name}": array for name, array in batch.items()}
    found = np.asarray(bind(both, started).read(reading).hidden)
    np.testing.assert_allclose(found, apply(alone, params, batch).hidden, rtol=1e-5, atol=1e-6)


def test_products_before_heads_are_counted() -> None:
    def logits(config: ModelConfig) -> dict[str, int]:
        return {item.name: item.flops for item in forward_products(config, 6) if item.part == "logits"}

    assert logits(BERT) == {"before_head": 2 * 6 * 12 * 12, "logits": 2 * 6 * 12 * 13}
    labels = dataclasses.replace(BERT, num_labels=3)
    assert logits(labels) == {"before_head": 2 * 6 * 12 * 12, "logits": 2 * 6 * 12 * 3}
    assert list(logits(dataclasses.replace(labels, pooler=False))) == ["logits"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"embedding_norm": True, "norm": "none"}, "model.embedding_norm = True has a norm, and model.norm = 'none'"),
        ({"head_transform": True, "activation": "swiglu"}, "not with model.activation = 'swiglu'"),
        ({"num_token_types": 2, "num_future_tokens": 1}, "have no types"),
        ({"decoder_start_token": 0}, "only model.architecture = 'encoder_decoder' begins a text so"),
        (
            {"decoder_start_token": 9000, "architecture": "encoder_decoder", "vocab_size": 5000},
            "must be below model.vocab_size = 5000",
        ),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], told: str) -> None:
    objective = "span_corruption" if changes.get("architecture") else "causal"
    objective = "multi_token" if changes.get("num_future_tokens") else objective
    (problem,) = problems_of(replace(Config(), model=changes, objective={"name": objective}))
    assert told in problem


def test_a_mask_is_a_token_of_the_vocabulary() -> None:
    config = replace(Config(), model={"architecture": "encoder", "vocab_size": 4100}, objective={"name": "masked_lm"})
    assert not problems_of(replace(config, objective={"mask_token": 103}))
    (problem,) = problems_of(replace(config, objective={"mask_token": 4100}))
    assert problem == "objective.mask_token = 4100: must be below model.vocab_size = 4100"

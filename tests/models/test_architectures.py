"""Every kind of stack: what depends on what, and that a cache gives what one pass gives."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ModelConfig
from transformer.models.masks import Tokens
from transformer.models.mixers import Context
from transformer.models.parameters import bind, init_parameters
from transformer.models.rotary import rotary_angles
from transformer.models.transformer import Transformer, apply, empty_cache

LENGTH = 14
BASE = ModelConfig(
    vocab_size=32,
    num_layers=2,
    width=16,
    num_heads=4,
    initial_scale=0.3,
    scan_layers=False,
    attention_implementation="reference",
)
STATES = {"num_kv_heads": 2, "state_width": 6, "num_features": 8, "chunk_length": 4}
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scanned, grouped": {"scan_layers": True, "num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "window": {"layers": "attention.window", "window": 3},
    "window and sinks": {"layers": "attention.window", "window": 3, "num_sinks": 2},
    "dilated": {"layers": "attention.dilated", "window": 3, "dilation": 2},
    "block-sparse": {"layers": "attention.block_sparse", "sparse_block": 2, "num_window_blocks": 1},
    "local and global": {"layers": "attention.window+attention", "window": 4, "scan_layers": True},
    "blockwise": {
        "attention_implementation": "blockwise",
        "layers": "attention.window",
        "window": 3,
        "num_kv_heads": 2,
    },
    "sinusoidal": {"positions": "sinusoidal"},
    "learned": {"positions": "learned", "num_positions": LENGTH},
    "alibi": {"positions": "alibi"},
    "relative": {"positions": "relative", "num_relative_buckets": 8, "max_relative_distance": 10},
    "no positions": {"positions": "none"},
    "half rotary": {"rotary_share": 0.5},
    "linear rotary": {"rotary_scaling": "linear", "rotary_factor": 4.0},
    "yarn": {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_length": 16},
    "llama 3 rotary": {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original_length": 16},
    "sandwich": {"norm_placement": "sandwich", "qk_norm": True},
    "post": {"norm_placement": "post"},
    "parallel": {"parallel_blocks": True, "biases": True},
    "no norm": {"norm": "none"},
    "no residuals": {"residuals": False},
    "no MLP": {"layers": "attention/none"},
    "soft caps": {"attention_soft_cap": 2.0, "logit_soft_cap": 3.0},
    "scales": {"residual_scale": 0.5, "embedding_scale": 3.0, "attention_scale": 0.3},
    "experts": {"layers": "attention/experts", "expert_width": 16, "num_experts": 4},
    "dense and experts": {
        "layers": "attention+attention/experts",
        "expert_width": 16,
        "num_experts": 4,
        "experts_per_token": 1,
        "num_shared_experts": 1,
        "activation": "swiglu",
        "router_score": "sigmoid",
        "balance_bias_rate": 1.0,
        "scan_layers": True,
    },
    "latent": {"layers": "latent_attention", "latent_width": 6, "rotary_head_width": 2},
    "latent, of queries too, scanned": {
        "layers": "latent_attention",
        "latent_width": 24,
        "query_latent_width": 8,
        "rotary_head_width": 4,
        "biases": True,
        "scan_layers": True,
    },
    "latent, window, relative": {
        "layers": "latent_attention.window",
        "window": 3,
        "latent_width": 6,
        "rotary_head_width": 2,
        "positions": "relative",
    },
    "linear, performer, retention": {"layers": "linear_attention/none+performer/none+retention", "num_layers": 3}
    | STATES,
    "gated linear and Mamba-2": {"layers": "gated_linear_attention/none+mamba2/none"} | STATES,
    "gated delta net and attention": {"layers": "gated_delta_net/none+attention", "scan_layers": True, **STATES},
    "encoder-decoder": {"architecture": "encoder_decoder", "num_encoder_layers": 1},
    "encoder-decoder, relative, scanned": {
        "architecture": "encoder_decoder",
        "positions": "relative",
        "scan_layers": True,
        "norm_placement": "sandwich",
    },
    "LSTM": {"layers": "lstm/none", "norm": "none", "residuals": False, "positions": "none"},
    "GRU, wide, and attention, scanned": {"layers": "gru+attention/none", "recurrent_width": 24, "scan_layers": True},
    "minGRU": {"layers": "mingru", "positions": "none"},
    "encoder-decoder, Bahdanau": {
        "architecture": "encoder_decoder",
        "layers": "gru/none",
        "cross_attention": "bahdanau",
        "positions": "none",
    },
    "encoder-decoder, Bahdanau, scanned": {
        "architecture": "encoder_decoder",
        "layers": "lstm",
        "encoder_layers": "attention",
        "cross_attention": "bahdanau",
        "scan_layers": True,
    },
    "encoder-decoder, Luong": {
        "architecture": "encoder_decoder",
        "layers": "lstm/none",
        "encoder_layers": "mingru",
        "cross_attention": "luong",
        "positions": "none",
    },
}


IN_EVERY_RUN = (
    "plain",
    "scanned, grouped",
    "window and sinks",
    "block-sparse",
    "blockwise",
    "learned",
    "relative",
    "dense and experts",
    "latent, of queries too, scanned",
    "linear, performer, retention",
    "gated linear and Mamba-2",
    "gated delta net and attention",
    "encoder-decoder, relative, scanned",
    "GRU, wide, and attention, scanned",
    "minGRU",
    "encoder-decoder, Bahdanau, scanned",
    "encoder-decoder, Luong",
)
"""One of each kind; the others are made on demand."""

VARIANTS = [
    pytest.param(changes, id=name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow)
    for name, changes in DECODERS.items()
]


def build(changes: dict[str, Any]) -> tuple[Transformer, Any]:
    model = Transformer(dataclasses.replace(BASE, **changes))
    return model, init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))


def batch_of(model: Transformer, length: int = LENGTH, padding: int = 0) -> dict[str, jax.Array]:
    """Two texts, the second with padding before it; what they are to read has padding after it."""
    rng = np.random.default_rng(0)
    column = np.arange(length)
    positions = np.stack([column, np.maximum(column - padding, 0)])
    segments = np.stack([np.ones(length), column >= padding]).astype(np.int32)
    batch = {"inputs": rng.integers(0, 32, (2, length)), "positions": positions, "segment_ids": segments}
    if model.encoder is not None and model.decoder is not None:
        places = np.stack([np.arange(6), np.arange(6)])
        # Tokens that the decoder of `dependencies` does not have: its embeddings are not those of what is read.
        batch |= {"encoder_inputs": rng.integers(LENGTH, 31, (2, 6)), "encoder_positions": places}
        batch |= {"encoder_segment_ids": (places < np.array([[6], [4]])).astype(np.int32)}
    return {name: jnp.asarray(values, jnp.int32) for name, values in batch.items()}


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_cache_gives_what_one_pass_gives(changes):
    """Prompts of different lengths in one go, some tokens together, the rest one by one."""
    model, params = build(changes)
    batch = batch_of(model, padding=3)

    def run(params, batch, cache):
        outputs = apply(model, params, batch, cache=cache)
        return outputs.logits(outputs.hidden), outputs.cache

    step = jax.jit(run)
    expected, _ = step(params, batch, None)
    cache = empty_cache(model, 2, LENGTH + 2, 6 if "encoder_inputs" in batch else 0)
    found, columns = [], [slice(0, 6), slice(6, 9), *(slice(t, t + 1) for t in range(9, LENGTH))]
    for these in columns:
        part = {name: values[:, these] for name, values in batch.items() if not name.startswith("encoder")}
        if these.start == 0:
            part |= {name: values for name, values in batch.items() if name.startswith("encoder")}
        logits, cache = step(params, part, cache)
        found.append(logits)
    real = np.asarray(batch["segment_ids"]) != 0
    # Without the padding columns of the vocabulary, beside which no difference would show.
    actual, expected = (np.asarray(logits)[real][:, :32] for logits in (np.concatenate(found, axis=1), expected))
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    # With logits that hardly differ from text to text, anything would agree.
    assert np.std(expected, axis=0).mean() > 1e-3 * np.abs(expected).mean()


def dependencies(model: Transformer, params: Any, batch: dict[str, jax.Array]) -> np.ndarray:
    """Which hidden states of a row depend on which of its tokens: [T, T], from the gradient of each."""
    tokens = jnp.arange(LENGTH)[None]

    def hidden(rows: jax.Array) -> jax.Array:
        table = params["embedding"].at[:LENGTH].set(rows)
        first = {name: values[:1] for name, values in batch.items()}
        outputs = apply(model, params | {"embedding": table}, first | {"inputs": tokens})
        return outputs.hidden[0]

    rows = jax.random.normal(jax.random.key(1), (LENGTH, 16))
    jacobian = jax.jit(jax.jacrev(lambda rows: hidden(rows)[:, :2]))(rows)
    return np.any(np.asarray(jacobian) != 0, axis=(1, 3))


@pytest.mark.parametrize("changes", VARIANTS)
def test_no_state_depends_on_a_later_token(changes):
    model, params = build(changes)
    found = dependencies(model, params, batch_of(model))
    assert not np.any(np.triu(found, 1))
    assert np.all(np.diag(found))
    if "residuals" not in changes and "layers" not in changes:
        assert np.array_equal(found, np.tri(LENGTH, dtype=bool))


def test_an_encoder_sees_both_ways_within_a_text():
    model, params = build({"architecture": "encoder"})
    batch = batch_of(model)
    segments = jnp.asarray([[1] * 5 + [2] * 6 + [0] * 3] * 2)
    found = dependencies(model, params, batch | {"segment_ids": segments})
    same = (segments[0][:, None] == segments[0]) & (segments[0] != 0) | np.eye(LENGTH, dtype=bool)
    assert np.array_equal(found, same)


def test_a_prefix_is_seen_both_ways_and_nothing_else_is():
    model, params = build({})
    prefix = jnp.arange(LENGTH) < 6
    found = dependencies(model, params, batch_of(model) | {"prefix": jnp.stack([prefix, prefix])})
    expected = np.tri(LENGTH, dtype=bool) | np.asarray(prefix)
    assert np.array_equal(found, expected)


def test_a_pattern_leaves_what_its_mask_leaves():
    """One layer: a state depends on the tokens that the definition of the pattern names, and on no others."""
    t, s = np.indices((LENGTH, LENGTH))
    past = s <= t
    blocks = t // 2, s // 2
    expected = {
        "window": past & (t - s < 3),
        "window and sinks": past & ((t - s < 3) | (s < 2)),
        "dilated": past & ((t - s) % 2 == 0) & (t - s < 6),
        "block-sparse": past & ((blocks[0] == blocks[1]) | (blocks[1] < 1)),
    }
    for name, visible in expected.items():
        model, params = build(DECODERS[name] | {"num_layers": 1, "num_random_blocks": 0})
        assert np.array_equal(dependencies(model, params, batch_of(model)), visible), name


def test_random_blocks_are_of_the_past_and_as_many_as_asked_for():
    changes = DECODERS["block-sparse"] | {"num_layers": 1, "num_global_blocks": 0, "sparse_block": 1}
    model, params = build(changes | {"num_random_blocks": 2})
    found = dependencies(model, params, batch_of(model))
    others = (found & ~np.eye(LENGTH, dtype=bool)).sum(axis=1)
    assert np.all(others <= 2) and np.any(others == 2) and not np.any(np.triu(found, 1))


def test_what_an_encoder_decoder_reads_reaches_every_token_it_writes():
    model, params = build(DECODERS["encoder-decoder"])
    batch = batch_of(model)

    def logits(kept: jax.Array) -> np.ndarray:
        changed = batch | {"encoder_inputs": kept}
        outputs = apply(model, params, changed)
        return np.asarray(outputs.logits(outputs.hidden))

    first = logits(batch["encoder_inputs"])
    seen, padding = batch["encoder_inputs"].at[1, 3].add(1), batch["encoder_inputs"].at[1, 4].add(1)
    assert np.all(np.any(logits(seen)[1] != first[1], axis=-1))
    assert np.array_equal(logits(seen)[0], first[0])
    assert np.array_equal(logits(padding), first)


def test_packed_pairs_read_their_own_text_alone():
    model, params = build(DECODERS["encoder-decoder"])
    batch = batch_of(model)
    packed = batch | {
        "segment_ids": jnp.asarray([[1] * 6 + [2] * 5 + [0] * 3] * 2),
        "positions": jnp.asarray([[*range(6), *range(5), 0, 0, 0]] * 2),
        "encoder_segment_ids": jnp.asarray([[1, 1, 2, 2, 2, 0]] * 2),
        "encoder_positions": jnp.asarray([[0, 1, 0, 1, 2, 0]] * 2),
    }
    outputs = apply(model, params, packed)
    for start, stop, first, last in ((0, 6, 0, 2), (6, 11, 2, 5)):
        alone = {name: packed[name][:, start:stop] for name in ("inputs", "positions", "segment_ids")}
        alone |= {f"encoder_{n}": packed[f"encoder_{n}"][:, first:last] for n in ("inputs", "positions", "segment_ids")}
        hidden = apply(model, params, alone).hidden
        np.testing.assert_allclose(outputs.hidden[:, start:stop], hidden, rtol=1e-4, atol=1e-5)


def test_classes_come_from_a_head_of_their_own():
    model, params = build({"architecture": "encoder", "num_labels": 3})
    outputs = apply(model, params, batch_of(model))
    assert outputs.logits(outputs.hidden).shape == (2, LENGTH, 3) and "head" not in params


@pytest.mark.parametrize("positions", ["rotary", "alibi", "relative"])
def test_heads_for_further_tokens_are_told_positions(positions):
    """Their block sees the same states in another order as another text."""
    model, params = build({"positions": positions, "num_future_tokens": 1, "num_layers": 1})
    batch = {name: values[:1] for name, values in batch_of(model).items()}
    module = bind(model, params)
    assert module.future is not None
    hidden = jax.random.normal(jax.random.key(2), (1, LENGTH, 16))
    swapped = jnp.asarray([1, 0, *range(2, LENGTH)])
    tokens = Tokens(batch["positions"], batch["segment_ids"])
    angles = rotary_angles(tokens.positions, model.config, 4) if positions == "rotary" else None
    context = Context(tokens, tokens, rotary=angles)

    def future(order: jax.Array | slice) -> jax.Array:
        assert module.future is not None
        (states,), _ = module.future(
            hidden[:, order], batch["inputs"][:, order], lambda ids, _: params["embedding"][ids], context, None
        )
        return states

    first, other = future(slice(None)), future(swapped)
    assert not np.allclose(first[0, -1], other[0, -1], atol=1e-4)


def test_heads_for_further_tokens_drop_activations_too():
    model, params = build({"num_future_tokens": 2, "num_layers": 1, "dropout": 0.5})
    batch, bound = batch_of(model), bind(model, params)
    tokens = Tokens(batch["positions"], batch["segment_ids"])
    context = Context(tokens, tokens, rotary=rotary_angles(tokens.positions, model.config, 4))
    hidden = jax.random.normal(jax.random.key(2), (2, LENGTH, 16))

    def heads(seed: int) -> list[jax.Array]:
        assert bound.future is not None
        return bound.future(
            hidden, batch["inputs"], lambda ids, _: params["embedding"][ids], context, jax.random.key(seed)
        )[0]

    assert not any(np.allclose(*pair) for pair in zip(heads(0), heads(1), strict=True))


@pytest.mark.parametrize("placement", [pytest.param("pre", marks=pytest.mark.slow), "post"])
def test_heads_for_further_tokens_are_computed_again_for_their_gradient(placement):
    """And are as without; where norms come last, a block has one already."""

    def gradient(remat: str) -> tuple[Any, str]:
        changes = {"num_future_tokens": 1, "num_layers": 1, "remat": remat, "norm_placement": placement}
        model, params = build(changes)
        batch = batch_of(model)
        assert ("final_norm" in params["future"]["heads"][0]) == (placement == "pre")

        def loss(params: Any) -> jax.Array:
            future = apply(model, params, batch).future
            assert future is not None
            return jnp.sum(jnp.sin(future(batch["inputs"])[0][0]))

        return jax.grad(loss)(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    (plain, program), (again, program_again) = gradient("none"), gradient("full")
    marks = [len(re.findall(r"(?:remat|checkpoint)\d*\[", text)) for text in (program, program_again)]
    assert marks == [0, 2]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), plain, again)

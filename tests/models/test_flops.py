"""The FLOP count against published numbers and against the matrix products of a compiled program."""

import dataclasses
import math
import re
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import LayerKind, ModelConfig
from transformer.config.model import LinearMixer
from transformer.models.flops import (
    PEAK_FLOPS,
    forward_flops,
    forward_products,
    mixer_products,
    peak_flops,
    training_flops_per_token,
)
from transformer.models.masks import Mask, Tokens
from transformer.models.mixers import Context, make_mixer
from transformer.models.parameters import abstract_parameters, bind
from transformer.models.patterns import make_pattern
from transformer.models.transformer import Transformer, apply
from transformer.objectives.cross_entropy import softmax_cross_entropy

GPT2 = ModelConfig(vocab_size=50_257, num_layers=12, width=768, num_heads=12)


def test_gpt2_by_hand():
    parts = forward_flops(GPT2, 1024)
    # nanoGPT's transformer_sizing.ipynb: 12 layers of attention and MLP, and the logits, at 1,024 tokens.
    assert parts["attention_projections"] == 12 * (3_623_878_656 + 1_207_959_552)
    assert parts["attention_scores"] == 12 * 2 * 1_610_612_736
    assert parts["feedforward"] == 12 * 2 * 4_831_838_208
    assert parts["logits"] == 79_047_426_048
    full = sum(value for name, value in parts.items() if name != "attention_scores_causal")
    assert full == 291_648_307_200
    assert 1024 * training_flops_per_token(GPT2, 1024) == 874_944_921_600


def test_causal_attention_counts_the_pairs_that_the_mask_leaves():
    length = 7
    parts = forward_flops(GPT2, length)
    pairs = sum(s <= t for t in range(length) for s in range(length))
    assert parts["attention_scores_causal"] == parts["attention_scores"] * pairs / length**2
    difference = training_flops_per_token(GPT2, length) - training_flops_per_token(GPT2, length, causal=True)
    assert difference == 3 * (parts["attention_scores"] - parts["attention_scores_causal"]) / length


def test_products_are_told_one_by_one():
    """By stack, part and name; together they are what is counted."""
    config = dataclasses.replace(
        GPT2, num_layers=2, activation="swiglu", num_kv_heads=4, architecture="encoder_decoder"
    )
    found = {(item.stack, item.part, item.name): item.flops for item in forward_products(config, 10, 6)}
    assert found["decoder", "attention_projections", "query"] == 2 * 2 * 10 * 768 * 768
    assert found["decoder", "attention_projections", "key"] == 2 * 2 * 10 * 768 * 256
    assert found["encoder", "feedforward", "gate"] == 2 * 2 * 6 * 768 * config.ff_width
    assert found["decoder", "cross_attention_scores", "weights_value"] == 2 * 2 * 10 * 6 * 768
    assert found["output", "logits", "logits"] == 2 * 10 * 768 * 50_257
    parts = forward_flops(config, 10, 6)
    assert sum(found.values()) == sum(parts.values()) - parts["attention_scores_causal"]


PATTERNS: dict[str, dict[str, Any]] = {
    "full": {},
    "window": {"window": 7},
    "a window wider than the text": {"window": 60},
    "window and sinks": {"window": 3, "num_sinks": 5},
    "dilated": {"window": 4, "dilation": 3},
    "block-sparse": {"sparse_block": 4, "num_global_blocks": 1, "num_window_blocks": 3, "num_random_blocks": 2},
}
KINDS = {"full": "full", "dilated": "dilated", "block-sparse": "block_sparse"}


@pytest.mark.parametrize("length", [1, 16, 51])
@pytest.mark.parametrize("name", PATTERNS)
def test_sparse_patterns_count_the_pairs_that_they_leave(name, length):
    """Of a decoder and of an encoder, against the masks themselves."""
    kind = KINDS.get(name, "window")
    config = dataclasses.replace(GPT2, layers=f"attention.{kind}", **PATTERNS[name])
    position, column = np.arange(length)[None, :, None], np.arange(length)[None, None, :]
    tokens = Tokens(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    for causal, architecture in ((True, "decoder"), (False, "encoder")):
        parts = forward_flops(dataclasses.replace(config, architecture=architecture), length)
        pattern = make_pattern(config, kind)
        visible = np.asarray(Mask(tokens, tokens, causal, sparsity=pattern).visible())
        allowed = pattern.allows(position, column, causal) if pattern is not None else np.ones_like(visible)
        assert parts["attention_scores"] == 12 * 4 * 768 * np.sum(allowed)
        assert parts["attention_scores_causal"] == 12 * 4 * 768 * np.sum(visible)


def test_a_window_makes_attention_linear_in_the_length():
    config = dataclasses.replace(GPT2, layers="attention.window", window=256)
    short, middle, long = (forward_flops(config, length)["attention_scores_causal"] for length in (1024, 8192, 65_536))
    per_token = 12 * 4 * 768 * 256
    assert middle - short == per_token * (8192 - 1024)
    assert long - middle == per_token * (65_536 - 8192)
    full = [forward_flops(GPT2, length)["attention_scores_causal"] for length in (8192, 65_536)]
    assert full[1] > 63 * full[0]
    # One layer in four without a window: its share is counted by itself.
    mixed = dataclasses.replace(config, layers="3*attention.window+attention")
    assert forward_flops(mixed, 8192)["attention_scores_causal"] == (3 * middle + full[0]) // 4


def product_flops(hlo: str) -> int:
    """Adds up 2 m k n over the `dot` instructions of a compiled program."""
    shapes = {
        name: [int(dim) for dim in dims.split(",") if dim]
        for name, dims in re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", hlo)
    }
    # Parameters of fusions are declared in the same form; operands are printed with or without their types.
    dots = re.findall(r"= \w+\[([\d,]*)\]\S* dot\((?:\S+ )?(%[\w.-]+), .*lhs_contracting_dims=\{([\d,]*)\}", hlo)
    total = 0
    for result, left, contracting in dots:
        inner = math.prod(shapes[left][int(dim)] for dim in contracting.split(",") if dim)
        total += 2 * inner * math.prod(int(dim) for dim in result.split(",") if dim)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "swiglu", "num_kv_heads": 2, "tied_embeddings": False, "head_width": 24},
        {"architecture": "encoder_decoder", "num_encoder_layers": 2},
        {"architecture": "encoder", "layers": "2*attention/none+attention"},
        # With room for exactly as many tokens as there are choices, what is computed is what is counted.
        {"layers": "2*attention+attention/experts", "num_experts": 4, "expert_capacity_factor": 1.0}
        | {"expert_width": 32, "num_shared_experts": 1, "activation": "swiglu"},
        {"layers": "latent_attention", "latent_width": 24, "query_latent_width": 40, "rotary_head_width": 8},
    ],
    ids=["plain", "grouped gated", "encoder-decoder", "encoder", "experts", "latent"],
)
def test_count_is_that_of_the_compiled_program(changes):
    length, rows = 32, 3
    config = ModelConfig(vocab_size=256, num_layers=3, width=64, num_heads=4, positions="rotary", scan_layers=False)
    config = dataclasses.replace(config, **changes)
    model, source = Transformer(config), 20
    names = ("inputs", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in names}

    reads = ("encoder_inputs", "encoder_positions", "encoder_segment_ids")
    if config.architecture == "encoder_decoder":
        batch |= {name: jax.ShapeDtypeStruct((rows, source), jnp.int32) for name in reads}

    def loss(params, batch):
        outputs = apply(model, params, batch)
        return jnp.sum(softmax_cross_entropy(outputs.logits(outputs.hidden), batch["targets"])[0])

    params = abstract_parameters(model)

    def compiled(function) -> Any:
        return jax.jit(function).lower(params, batch).compile().as_text()

    parts = forward_flops(config, length, source)
    expected = rows * sum(value for name, value in parts.items() if name != "attention_scores_causal")
    assert product_flops(compiled(loss)) == pytest.approx(expected, rel=0.01)
    expected = rows * length * training_flops_per_token(config, length, source_length=source)
    assert product_flops(compiled(jax.value_and_grad(loss))) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", get_args(LinearMixer))
def test_a_mixer_with_a_state_counts_as_it_compiles(name):
    length, rows, heads, keys, values = 64, 3, 4, 24, 16
    config = ModelConfig(width=64, chunk_length=32, num_heads=heads, num_kv_heads=2, state_width=keys, num_features=40)
    mixer = make_mixer(config, LayerKind(name), 1)
    ones = jnp.ones((rows, length), jnp.int32)
    context = Context(Tokens(ones, ones), Tokens(ones, ones))

    def run(params, x):
        return bind(mixer, params)(x, context, None, 0)[0]

    x = jax.ShapeDtypeStruct((rows, length, 64), jnp.float32)
    lowered: Any = jax.jit(run).lower(abstract_parameters(mixer), x)
    expected = sum(product.flops for product in mixer_products(config, LayerKind(name), length, True))
    if name == "gated_linear_attention":
        # Of a chunk's pairs, those between halves are products; those within eight tokens are computed one by one.
        expected -= 2 * 2 * heads * keys * (32 * 32 - (16 * 16 + 2 * 8 * 8))
    if name == "gated_delta_net":
        expected -= 2 * heads * keys * keys * values  # of two turns of the loop, the program shows one
    assert product_flops(lowered.compile().as_text()) == pytest.approx(rows * expected, rel=0.01)


def test_mixers_with_a_state_are_linear_in_the_length():
    for name in get_args(LinearMixer):
        short, long = (forward_flops(dataclasses.replace(GPT2, layers=name), length) for length in (128, 16 * 128))
        assert {part: 16 * flops for part, flops in short.items()} == long and long["attention_scores"] == 0
    hybrid = dataclasses.replace(GPT2, layers="3*mamba2+attention")
    parts, attention = forward_flops(hybrid, 1024), forward_flops(GPT2, 1024)
    assert parts["attention_scores"] * 4 == attention["attention_scores"]
    pure = forward_flops(dataclasses.replace(GPT2, layers="mamba2"), 1024)
    assert parts["recurrence"] * 4 == pure["recurrence"] * 3 > 0


def traced_flops(jaxpr: Any, times: int = 1) -> int:
    """Adds up 2 m k n over the matrix products of a traced program, those of a loop as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape, result = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * times * math.prod(shape[dim] for dim in left) * math.prod(result)
        runs = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += traced_flops(inner, runs) if hasattr(inner, "eqns") else 0
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": "lstm+mingru/none"},
        {"layers": "gru", "recurrent_width": 96},
        {"architecture": "encoder", "layers": "gru/none"},
        {"layers": "gru/none", "encoder_layers": "lstm", "cross_attention": "bahdanau"},
        {"layers": "gru+mingru", "encoder_layers": "mingru", "cross_attention": "bahdanau", "recurrent_width": 96},
        {"layers": "lstm/none", "cross_attention": "luong"},
    ],
    ids=["decoder", "wide", "encoder", "bahdanau", "wide bahdanau", "luong"],
)
def test_count_of_recurrent_layers_is_that_of_the_traced_program(changes):
    length, source, rows = 32, 20, 3
    shape = {"num_layers": 2, "width": 64, "num_heads": 4, "positions": "none", "scan_layers": False}
    if "cross_attention" in changes:
        changes = changes | {"architecture": "encoder_decoder"}
    config = ModelConfig(vocab_size=256, **(shape | changes))
    model = Transformer(config)
    read = {f"encoder_{name}": source for name in ("inputs", "positions", "segment_ids")}
    sizes = {name: length for name in ("inputs", "targets", "positions", "segment_ids")}
    sizes |= read if "cross_attention" in changes else {}
    batch = {name: jax.ShapeDtypeStruct((rows, size), jnp.int32) for name, size in sizes.items()}

    def loss(params, batch):
        outputs = apply(model, params, batch)
        return jnp.sum(outputs.logits(outputs.hidden))

    parts = forward_flops(config, length, source)
    expected = rows * sum(value for name, value in parts.items() if name != "attention_scores_causal")
    params = abstract_parameters(model)
    assert traced_flops(jax.make_jaxpr(loss)(params, batch).jaxpr) == expected
    expected = rows * length * training_flops_per_token(config, length, source_length=source)
    found = traced_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params, batch).jaxpr)
    # An additive score's gradient has one product of its three written as a multiplication.
    assert found == pytest.approx(expected, rel=0.02)


def test_a_padded_vocabulary_is_not_counted():
    padded = dataclasses.replace(GPT2, vocab_size=50_304)
    difference = forward_flops(padded, 8)["logits"] - forward_flops(GPT2, 8)["logits"]
    assert difference == 2 * 8 * 768 * (50_304 - 50_257)


def test_peaks_are_known_or_absent():
    assert peak_flops("TPU v4", 8) == 8 * 275e12
    assert peak_flops("cpu", 8) is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS.values())

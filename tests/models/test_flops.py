"""The FLOP count against published numbers and against the matrix products of a compiled program."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from transformer.config import ModelConfig
from transformer.models.flops import PEAK_FLOPS, forward_flops, peak_flops, training_flops_per_token
from transformer.models.parameters import abstract_parameters
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
        quick = {"xla_backend_optimization_level": 0}
        return jax.jit(function, compiler_options=quick).lower(params, batch).compile().as_text()

    parts = forward_flops(config, length, source)
    expected = rows * sum(value for name, value in parts.items() if name != "attention_scores_causal")
    assert product_flops(compiled(loss)) == pytest.approx(expected, rel=0.01)
    expected = rows * length * training_flops_per_token(config, length, source_length=source)
    assert product_flops(compiled(jax.value_and_grad(loss))) == pytest.approx(expected, rel=0.01)


def test_a_padded_vocabulary_is_not_counted():
    padded = dataclasses.replace(GPT2, vocab_size=50_304)
    difference = forward_flops(padded, 8)["logits"] - forward_flops(GPT2, 8)["logits"]
    assert difference == 2 * 8 * 768 * (50_304 - 50_257)


def test_peaks_are_known_or_absent():
    assert peak_flops("TPU v4", 8) == 8 * 275e12
    assert peak_flops("cpu", 8) is None
    assert all(1e14 < peak < 1e16 for peak in PEAK_FLOPS.values())

"""Patterns of layers: how they are read, and what their kinds cannot do."""

from typing import Any

import pytest

from transformer.config import Config, LayerKind, parse_layers, problems_of, replace


def test_a_pattern_of_layers_is_read() -> None:
    assert parse_layers("attention") == (LayerKind("attention"),)
    assert parse_layers("2*attention.window/none + attention") == (
        *[LayerKind("attention", "window", "none")] * 2,
        LayerKind("attention"),
    )
    assert parse_layers("attention.window@none/experts") == (LayerKind("attention", "window", "experts", False),)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": "0*attention"}, "'0*attention' is not of the form"),
        ({"layers": "attention++attention"}, "'' is not of the form"),
        ({"layers": "atention"}, "'atention' is not a mixer"),
        ({"layers": "attention.windw"}, "'windw' is not a pattern, which are full, window, dilated, block_sparse (did"),
        ({"layers": "attention/dens"}, "'dens' is not a feed-forward kind, which are dense, experts, none (did"),
        ({"layers": "lstm.window"}, "only attention has keys that a pattern such as window leaves out, not lstm"),
        ({"layers": "lstm@none"}, "lstm@none is not possible, but attention@none and latent_attention@none"),
        (
            {"layers": "attention@none", "positions": "learned"},
            "@none leaves out rotary positions, and model.positions",
        ),
        ({"layers": "attention@window"}, "'attention@window' is not of the form"),
        ({"first_layers": ""}, "model.first_layers = '': '' is not of the form"),
        ({"first_layers": "atention"}, "model.first_layers = 'atention': 'atention' is not a mixer"),
        (
            {"first_layers": "4*attention"},
            "model.num_layers = 4 leaves no layer for model.layers = 'attention' after the 4",
        ),
        (
            {"first_layers": "attention", "layers": "2*attention"},
            "does not divide model.num_layers = 4 after the 1 of model.first_layers = 'attention'",
        ),
        ({"window_rotary_base": 100.0}, "model.window_rotary_base = 100.0: no layer of model.layers = 'attention'"),
        ({"window_rotary_base": 100.0, "positions": "learned"}, "needs model.positions = 'rotary', not 'learned'"),
        ({"rotary_attention_factor": 1.0}, "needs model.rotary_scaling = 'yarn', not 'none'"),
        ({"layers": "3*attention"}, "is a period of 3 layers, which does not divide model.num_layers = 4"),
    ],
)
def test_a_wrong_pattern_of_layers_is_told(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(replace(Config(), model=changes))
    assert "layers" not in changes or f"model.layers = {changes['layers']!r}" in problem
    assert expected in problem


PAIRS = {"architecture": "encoder_decoder"}
RULES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"positions": "relative", "num_relative_buckets": 2, "max_relative_distance": 2}, "causal", None),
    (
        {"positions": "relative", "num_relative_buckets": 1},
        "causal",
        "model.num_relative_buckets = 1: model.architecture = 'decoder' needs at least 2",
    ),
    (
        PAIRS | {"positions": "relative", "num_relative_buckets": 3},
        "span_corruption",
        "model.num_relative_buckets = 3: model.architecture = 'encoder_decoder' needs at least 4",
    ),
    (
        {"positions": "relative", "max_relative_distance": 16},
        "causal",
        "model.max_relative_distance = 16: must be more than 16, up to which distances have a bucket each "
        "(model.num_relative_buckets = 32)",
    ),
    ({"architecture": "encoder", "positions": "relative", "max_relative_distance": 9}, "masked_lm", None),
    (
        {"rotary_scaling": "dynamic_ntk", "rotary_original_length": 64},
        "causal",
        "model.rotary_scaling = 'dynamic_ntk' with data.sequence_length = 256 beyond 64 (model.rotary_original_length): "
        "texts in one row would be turned as the longest of them; train with another scaling",
    ),
    (
        {"layers": "attention.block_sparse", "num_window_blocks": 2},
        "causal",
        "model.num_window_blocks = 2: must be odd, a block and as many on either side",
    ),
    (
        {"cross_attention": "luong"},
        "causal",
        "model.cross_attention = 'luong': only model.architecture = 'encoder_decoder' reads an encoder, not 'decoder'",
    ),
    (
        PAIRS | {"cross_attention": "bahdanau", "layers": "mingru+attention"},
        "span_corruption",
        "model.cross_attention = 'bahdanau': it is part of the steps of lstm and gru, of which there is none in "
        "model.layers = 'mingru+attention'",
    ),
    (
        PAIRS | {"cross_attention": "luong", "parametrization": "mup"},
        "span_corruption",
        "model.parametrization = 'mup': it has no rules for recurrent networks and their attention; use 'standard'",
    ),
    (
        PAIRS | {"encoder_layers": "gru", "recurrent_width": 33},
        "span_corruption",
        "model.recurrent_width = 33: must be even, for half of an encoder's recurrent state goes each way",
    ),
    (
        {"architecture": "encoder", "layers": "lstm", "width": 33},
        "masked_lm",
        "model.width = 33: must be even, for half of an encoder's recurrent state goes each way",
    ),
    (
        {"layers": "attention+gru"},
        "prefix_lm",
        "model.layers = 'attention+gru': gru cannot see a prefix both ways, as objective.name = 'prefix_lm' asks",
    ),
    ({"layers": "lstm+gru/none", "width": 33}, "causal", None),  # without heads, their width is nothing to divide
    (PAIRS | {"cross_attention": "bahdanau", "layers": "gru", "num_heads": 7}, "span_corruption", None),
    (PAIRS | {"cross_attention": "luong", "layers": "mingru+attention"}, "span_corruption", None),
    (PAIRS | {"layers": "lstm", "encoder_layers": "attention"}, "span_corruption", None),
    (
        PAIRS | {"layers": "lstm", "num_heads": 7},
        "span_corruption",
        "model.width = 256 is not divisible by model.num_heads = 7: change one, or set model.head_width",
    ),
]


@pytest.mark.parametrize(("changes", "objective", "sentence"), RULES)
def test_what_recurrent_layers_cannot_do_is_told(changes: dict[str, Any], objective: str, sentence: str | None) -> None:
    problems = problems_of(replace(Config(), model=changes, objective={"name": objective}))
    assert problems == ([] if sentence is None else [sentence])

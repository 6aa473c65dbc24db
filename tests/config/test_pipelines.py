"""What cannot be a pipeline: one sentence, before anything is compiled."""

from typing import Any

import pytest

from transformer.config import Config, problems_of, replace

PIPELINE = {"stage": 2, "fsdp": 1}
ROUNDS = PIPELINE | {"schedule": "interleaved", "rounds": 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"parallel": {"stage": -1, "fsdp": 1}}, ["parallel.stage = -1", "has to be given"]),
        ({"parallel": {"stage": 3, "fsdp": 1}}, ["model.num_layers = 4", "parallel.stage = 3"]),
        ({"parallel": ROUNDS, "model": {"num_layers": 6}}, ["model.num_layers = 6", "parallel.rounds = 2"]),
        (
            {"parallel": PIPELINE, "model": {"num_layers": 6, "layers": "attention/dense+attention.window/dense"}},
            ["model.num_layers = 6", "parallel.stage = 2 x 2", "period"],
        ),
        (
            {"parallel": PIPELINE, "train": {"num_microbatches": 1}},
            ["train.num_microbatches = 1", "parallel.stage = 2"],
        ),
        ({"parallel": ROUNDS, "train": {"num_microbatches": 5, "batch_size": 20}}, ["train.num_microbatches = 5"]),
        (
            {"parallel": PIPELINE, "model": {"num_layers": 5, "first_layers": "attention.window"}},
            ["model.first_layers = 'attention.window'", "parallel.stage = 2", "equal groups"],
        ),
        ({"parallel": PIPELINE | {"rounds": 2}}, ["parallel.rounds = 2", "'1f1b'"]),
        ({"parallel": {"rounds": 2}}, ["parallel.rounds = 2", "'interleaved'"]),
        ({"parallel": PIPELINE | {"schedule": "interleaved"}}, ["parallel.rounds = 1", "at least 2"]),
        (
            {
                "parallel": PIPELINE,
                "model": {"architecture": "encoder_decoder", "num_encoder_layers": 3},
                "objective": {"name": "span_corruption"},
            },
            ["model.num_encoder_layers = 3", "parallel.stage = 2"],
        ),
    ],
)
def test_pipelines_that_do_not_divide(changes: dict[str, Any], named: list[str]) -> None:
    config = replace(Config(), train={"num_microbatches": 4})
    (problem,) = problems_of(replace(config, **changes))
    assert all(part in problem for part in named), problem


@pytest.mark.parametrize("parallel", [PIPELINE, ROUNDS, PIPELINE | {"stage": 4, "schedule": "gpipe"}])
def test_pipelines_that_do(parallel: dict[str, Any]) -> None:
    assert problems_of(replace(Config(), train={"num_microbatches": 4}, parallel=parallel)) == []

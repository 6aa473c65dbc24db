"""The class of a text is asked for where the model has seen the text."""

import numpy as np
import pytest

from transformer.config import Config, replace
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.objectives import objective_of


@pytest.mark.parametrize(("architecture", "asked"), [("encoder", [0, 3, 5]), ("decoder", [2, 4, 9])])
def test_one_target_for_each_text(architecture: str, asked: list[int]) -> None:
    config = replace(Config(), objective={"name": "sequence_classification"}, model={"architecture": architecture})
    objective = objective_of(config)
    segments = np.repeat([1, 2, 3], [3, 2, 5])
    window = {
        "inputs": np.arange(10) + 4,
        "positions": np.concatenate([np.arange(size) for size in (3, 2, 5)]),
        "segment_ids": segments,
        "labels": np.array([7, 0, 5])[segments - 1],
    }
    row = objective.example(config, ByteTokenizer(), window, np.random.default_rng(0))
    assert set(row) == set(objective.arrays(config))
    assert np.flatnonzero(row["weights"]).tolist() == asked
    assert row["targets"][row["weights"] > 0].tolist() == [7, 0, 5]
    assert set(row["weights"].tolist()) == {0, 1}
    for name in ("inputs", "positions", "segment_ids"):
        assert row[name].tolist() == window[name].tolist()
    assert not objective.COUNTS_TEXT

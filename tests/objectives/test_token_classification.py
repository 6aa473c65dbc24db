"""The class of a word is asked for once, at a token where the model has seen the word."""

import numpy as np
import pytest

from transformer.config import Config, replace
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.objectives import objective_of


@pytest.mark.parametrize(("architecture", "asked"), [("encoder", [1, 2, 5, 8]), ("decoder", [1, 4, 5, 9])])
def test_one_target_for_each_word(architecture: str, asked: list[int]) -> None:
    config = replace(Config(), objective={"name": "token_classification"}, model={"architecture": architecture})
    objective = objective_of(config)
    # bos A B B B C eos | bos D D eos
    labels = np.array([-1, 2, 0, -1, -1, 3, -1, -1, 1, -1, -1])
    window = {
        "inputs": np.arange(11) + 4,
        "positions": np.concatenate([np.arange(7), np.arange(4)]),
        "segment_ids": np.repeat([1, 2], [7, 4]),
        "labels": labels,
    }
    row = objective.example(config, ByteTokenizer(), window, np.random.default_rng(0))
    assert set(row) == set(objective.arrays(config))
    assert np.flatnonzero(row["weights"]).tolist() == asked
    assert row["targets"][asked].tolist() == [2, 0, 3, 1]
    assert row["targets"].min() == 0 and set(row["weights"].tolist()) == {0, 1}
    for name in ("inputs", "positions", "segment_ids"):
        assert row[name].tolist() == window[name].tolist()
    assert not objective.COUNTS_TEXT

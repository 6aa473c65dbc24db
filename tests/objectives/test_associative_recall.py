"""Associative recall: the answer to every question is in the example, once."""

import numpy as np
import pytest

from transformer.config import Config, problems_of, replace
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.objectives import objective_of

TOKENIZER = ByteTokenizer()


def config_of(pairs: int, length: int) -> Config:
    data = {"tokenizer": "bytes", "sequence_length": length}
    return replace(Config(), objective={"name": "associative_recall", "num_pairs": pairs}, data=data)


@pytest.mark.parametrize("pairs", [1, 7, 128])
def test_every_key_is_told_once_and_asked_once(pairs):
    config = config_of(pairs, 400)
    assert not problems_of(config)
    most, generator, seen = pairs, np.random.default_rng(0), set()
    for _ in range(20):
        row = objective_of(config).example(config, TOKENIZER, {}, generator)
        [length] = {len(values) for values in row.values()}
        pairs = length // 3
        assert length == 3 * pairs and 1 <= pairs <= most
        seen.add(pairs)
        check(row, pairs)
    assert len(seen) > min(most, 5) // 2


def check(row: dict[str, np.ndarray], pairs: int) -> None:
    told: dict[int, int] = {int(key): int(value) for key, value in row["inputs"][: 2 * pairs].reshape(-1, 2)}
    asked = row["inputs"][2 * pairs :].tolist()
    assert sorted(asked) == sorted(told) and len(told) == pairs
    assert all(4 <= key < 132 <= value < 260 for key, value in told.items())
    assert row["targets"][2 * pairs :].tolist() == [told[key] for key in asked]
    assert row["weights"].tolist() == [0.0] * 2 * pairs + [1.0] * pairs


def test_examples_differ_with_their_generator():
    config = config_of(16, 48)
    first, other = (objective_of(config).example(config, TOKENIZER, {}, np.random.default_rng(seed)) for seed in (0, 1))
    assert first["inputs"].tolist() != other["inputs"].tolist()


def test_what_does_not_fit_is_refused():
    assert any("3 tokens a pair" in problem for problem in problems_of(config_of(16, 47)))
    assert any("a key of its own, and there are 128" in problem for problem in problems_of(config_of(129, 400)))
    config = replace(config_of(16, 48), data={"tokenizer": "bpe"})
    assert any("needs 'bytes'" in problem for problem in problems_of(config))

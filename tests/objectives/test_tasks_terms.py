"""Terms of the heads of tasks: pooling, regression, spans, and texts that are exactly right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, ObjectiveConfig, replace
from transformer.models.transformer import Outputs
from transformer.objectives import objective_of
from transformer.objectives.pooling import means, told
from transformer.objectives.span_extraction import best_spans
from transformer.objectives.terms import Terms

SEGMENTS = np.repeat([1, 2, 3, 0], [3, 2, 5, 2])


def terms_of(name: str, outputs: Outputs, batch: dict[str, Any], **objective: Any) -> Terms:
    config = ObjectiveConfig(name=name, **objective)  # pyright: ignore[reportArgumentType]
    return objective_of(replace(Config(), objective={"name": name})).terms(
        config, outputs, jax.tree.map(jnp.asarray, batch)
    )


@pytest.mark.parametrize(
    ("pooling", "architecture", "expected"),
    [
        ("auto", "encoder", [0, 3, 5]),
        ("auto", "decoder", [2, 4, 9]),
        ("last", "encoder", [2, 4, 9]),
        ("first", "decoder", [0, 3, 5]),
        ("mean", "decoder", [0, 3, 5]),
    ],
)
def test_where_the_label_of_a_text_is_told(pooling: str, architecture: str, expected: list[int]) -> None:
    config = replace(Config(), objective={"pooling": pooling}, model={"architecture": architecture})
    assert np.flatnonzero(told(config, {"segment_ids": SEGMENTS[:10]})).tolist() == expected


def test_the_mean_is_of_a_text_alone() -> None:
    hidden = np.random.default_rng(0).normal(size=(1, 12, 4)).astype(np.float32)
    found = np.asarray(means(jnp.asarray(hidden), jnp.asarray(SEGMENTS[None])))
    for segment in (1, 2, 3):
        here = np.equal(SEGMENTS, segment)
        np.testing.assert_allclose(found[0, here], np.broadcast_to(hidden[0, here].mean(0), (here.sum(), 4)), rtol=1e-5)


def test_the_loss_of_regression_is_the_squared_error() -> None:
    hidden = np.random.default_rng(1).normal(size=(1, 12, 4)).astype(np.float32)
    weights = np.zeros((1, 12), np.float32)
    weights[0, [0, 3, 5]] = 1
    batch = {"targets": np.full((1, 12), 0.25, np.float32), "weights": weights, "segment_ids": SEGMENTS[None]}
    outputs = Outputs(jnp.asarray(hidden), lambda x: 2 * x[..., :1])
    for pooling in ("first", "mean"):
        value, weight = terms_of("regression", outputs, batch, pooling=pooling).losses["squared_error"]
        texts = [hidden[0, np.equal(SEGMENTS, n)] for n in (1, 2, 3)]
        each = [text.mean(0) if pooling == "mean" else text[0] for text in texts]
        assert weight == 3
        assert value == pytest.approx(sum((2 * one[0] - 0.25) ** 2 for one in each), rel=1e-5)


def test_the_best_span_is_that_of_all_valid_ones() -> None:
    rng = np.random.default_rng(2)
    starts, ends = rng.normal(size=(2, 20, 9)).astype(np.float32)
    for longest in (1, 3, 9):
        first, last, score = best_spans(jnp.asarray(starts), jnp.asarray(ends), longest)
        for row in range(20):
            valid = {
                (a, b): starts[row, a] + ends[row, b]
                for a in range(9)
                for b in range(a, min(9, a + longest))
                if a or not b
            }
            best = max(valid, key=lambda span: valid[span])
            assert (int(first[row]), int(last[row])) == best and float(score[row]) == pytest.approx(valid[best])


def test_terms_of_spans() -> None:
    """Two questions: one with two answers, of which the second is found, and one without an answer, beside a row of padding."""
    logits = np.full((3, 6, 2), -3.0, np.float32)
    logits[0, 3, 0], logits[0, 4, 1] = 5, 5
    logits[0, 1] = 9  # of the question, where no answer may lie
    logits[1, 0] = 4
    starts, ends = np.zeros((2, 3, 6), np.int32)
    starts[0, :2], ends[0, :2] = [3, 4], [5, 5]  # tokens 2 to 4 and 3 to 4, counted from 1
    starts[1, 0], ends[1, 0] = 1, 1
    may = np.array([[1, 0, 1, 1, 1, 0]] * 2 + [[0] * 6], np.int32)
    weights = np.zeros((3, 6), np.float32)
    weights[:2, 0] = 1
    batch = {"answer_starts": starts, "answer_ends": ends, "may_answer": may, "weights": weights}
    terms = terms_of("span_extraction", Outputs(jnp.asarray(logits), lambda x: x), batch)
    assert terms.measures["exact_match"] == (2, 2) and terms.measures["f1"] == (2, 2)
    allowed = logits[:2][:, [0, 2, 3, 4]].astype(np.float64)
    logs = allowed - np.log(np.exp(allowed).sum(axis=1, keepdims=True))
    expected = -(logs[0, 1, 0] + logs[0, 3, 1] + logs[1, 0, 0] + logs[1, 0, 1]) / 2
    assert (
        terms.losses["cross_entropy"][0] == pytest.approx(expected, rel=1e-5) and terms.losses["cross_entropy"][1] == 2
    )
    starts[0, 1], ends[0, 1] = 0, 0  # only the first answer, of which two tokens of three are found
    terms = terms_of("span_extraction", Outputs(jnp.asarray(logits), lambda x: x), batch)
    assert terms.measures["exact_match"] == (1, 2)
    assert float(terms.measures["f1"][0]) == pytest.approx(1 + 2 * 2 / (3 + 2))


def test_texts_that_are_exactly_right() -> None:
    """Of three texts in a row one is right to its end; padding is none."""
    targets = np.arange(12) % 5
    predicted = targets.copy()
    predicted[[1, 9, 11]] += 1
    row = {"targets": targets, "segment_ids": SEGMENTS, "weights": (SEGMENTS > 0).astype(np.float32)}
    row["positions"] = np.concatenate([np.arange(size) for size in (3, 2, 5)] + [np.zeros(2, int)])
    outputs = Outputs(jnp.asarray(np.eye(7, dtype=np.float32)[predicted])[None], lambda x: 5 * x)
    terms = terms_of("text_to_text", outputs, {name: values[None] for name, values in row.items()})
    assert terms.measures["exact_match"] == (1, 3) and terms.measures["accuracy"][0] == 8

"""Scores of tasks, against their definitions."""

import numpy as np
import pytest
import scipy.stats

from transformer.objectives.scores import answer_scores, classification_scores, ranks, regression_scores


def test_matthews_and_f1_of_two_classes() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 200)
    predicted = np.where(rng.random(200) < 0.7, targets, 1 - targets)
    right, wrong = predicted == targets, predicted != targets
    tp, tn, fp, fn = (
        int(np.sum(which & (predicted == value))) for which, value in ((right, 1), (right, 0), (wrong, 1), (wrong, 0))
    )
    found = classification_scores(predicted, targets, 2)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert found["f1_macro"] == pytest.approx((found["f1"] + 2 * tn / (2 * tn + fp + fn)) / 2)
    expected = (tp * tn - fp * fn) / np.sqrt(float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert found["matthews"] == pytest.approx(expected) == pytest.approx(np.corrcoef(predicted, targets)[0, 1])


def test_matthews_of_several_classes_is_the_correlation_of_their_indicators() -> None:
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 4, 300)
    predicted = np.where(rng.random(300) < 0.5, targets, rng.integers(0, 4, 300))
    one, other = (np.eye(4)[labels] - np.eye(4)[labels].mean(axis=0) for labels in (predicted, targets))
    expected = np.sum(one * other) / np.sqrt(np.sum(one**2) * np.sum(other**2))
    found = classification_scores(predicted, targets, 4)
    assert found["matthews"] == pytest.approx(expected) and "f1" not in found


def test_what_is_not_defined_is_zero() -> None:
    same = np.ones(5, int)
    # A class that is neither there nor named is not counted.
    assert classification_scores(same, same, 3) == {"f1_macro": 1.0, "matthews": 0.0}
    assert classification_scores(same, same * 0, 2) == {"f1_macro": 0.0, "matthews": 0.0, "f1": 0.0}
    assert regression_scores(np.ones(4), np.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}


def test_correlations() -> None:
    rng = np.random.default_rng(2)
    targets = np.round(rng.random(100) * 5, 1)  # with equal ones
    predicted = (np.exp(targets) + rng.normal(0, 20, 100)).astype(np.float32)
    found = regression_scores(predicted, targets)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(predicted, targets)[0])
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(predicted, targets)[0])
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize(
    ("predicted", "answers", "expected"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], (1, 1)),
        ("in Paris", ["Rome", "Paris"], (0, 2 / 3)),
        ("", [], (1, 1)),
        ("Paris", [], (0, 0)),
        ("the", ["a"], (1, 1)),
        ("a b b", ["b b c"], (0, 0.8)),
    ],
)
def test_answers_are_compared_without_marks_and_articles(predicted: str, answers: list[str], expected: tuple) -> None:
    assert answer_scores(predicted, answers) == pytest.approx(expected)

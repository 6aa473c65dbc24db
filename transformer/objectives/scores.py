"""Scores of a task, from all its predictions on the host: what a sum over batches cannot tell.

Each is 0 where it is not defined: a correlation with what is always the same, an F1 of a class that nobody names.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np


def confusion(predicted: np.ndarray, targets: np.ndarray, num_labels: int) -> np.ndarray:
    """Returns how often each class (rows) was taken for each class (columns)."""
    size = max(num_labels, 1 + int(max(predicted.max(initial=0), targets.max(initial=0))))
    return np.bincount(targets * size + predicted, minlength=size * size).reshape(size, size)


def classification_scores(predicted: np.ndarray, targets: np.ndarray, num_labels: int) -> dict[str, float]:
    """Returns macro F1 and Matthews' correlation, and of two classes the F1 of the second.

    Macro F1 is the mean over the classes that occur, as a target or as a prediction. The correlation of several classes is
    R_K of Gorodkin (2004), "Comparing two K-category assignments by a K-category correlation coefficient".
    """
    table = confusion(predicted, targets, num_labels).astype(np.float64)
    right, asked, named, total = np.diag(table), table.sum(axis=1), table.sum(axis=0), table.sum()
    each = 2 * right / np.maximum(asked + named, 1)
    occurs = asked + named > 0
    spread = (total**2 - named @ named) * (total**2 - asked @ asked)
    found = {
        "f1_macro": float(each[occurs].mean()) if occurs.any() else 0.0,
        "matthews": float((right.sum() * total - named @ asked) / np.sqrt(spread)) if spread > 0 else 0.0,
    }
    return found | ({"f1": float(each[1])} if num_labels == 2 else {})


def correlation(predicted: np.ndarray, targets: np.ndarray) -> float:
    """Returns Pearson's correlation."""
    x, y = (values.astype(np.float64) - values.astype(np.float64).mean() for values in (predicted, targets))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm > 0 else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Returns the place of each value in their order, from 1; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse.reshape(-1)]


def regression_scores(predicted: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Returns the correlations of Pearson and of Spearman, which is that of the ranks."""
    if not len(targets):
        return {"pearson": 0.0, "spearman": 0.0}
    return {"pearson": correlation(predicted, targets), "spearman": correlation(ranks(predicted), ranks(targets))}


def normalized(answer: str) -> list[str]:
    """Returns the words of an answer that count: in lower case, without marks and English articles (Rajpurkar et al. 2016,
    section 5)."""
    kept = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def answer_scores(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """Returns exact match and F1 of words of an answer, with the most similar of those given; none given: no answer."""
    found = [(_same(predicted, answer), _overlap(predicted, answer)) for answer in answers or [""]]
    return max(exact for exact, _ in found), max(f1 for _, f1 in found)


def _same(predicted: str, answer: str) -> float:
    return float(normalized(predicted) == normalized(answer))


def _overlap(predicted: str, answer: str) -> float:
    one, other = normalized(predicted), normalized(answer)
    if not one or not other:
        return float(one == other)
    shared = sum((Counter(one) & Counter(other)).values())
    return 2 * shared / (len(one) + len(other))

"""The baseline that a language model must beat: an interpolated byte trigram.

Jelinek & Mercer (1980), "Interpolated estimation of Markov source parameters from sparse data", in the recursive form
of Chen & Goodman (1999), "An empirical study of smoothing techniques for language modeling", section 2.3:

    p_n(w | context) = λ · count(context w) / count(context) + (1 - λ) · p_{n-1}(w | context without its first byte)

for the unigram (n = 1), bigram and trigram; p_0 = 1/256. A weight λ is shared by the contexts of one order whose
count, divided by the number of different bytes that follow them, lies between the same powers of two.

A trigram is one integer, (first · 257 + second) · 256 + third, and a text is a vector of counts over those integers.
"""

from collections.abc import Iterable, Iterator

import numpy as np

START = 256
"""Stands before the first byte of a document, so that none is predicted from the document before it."""
NUM_BYTES, NUM_SYMBOLS, NUM_ORDERS, NUM_BUCKETS = 256, 257, 3, 34
HELD_OUT = 10
"""One part in this many of the training text is held out to fit the weights."""
EM_STEPS = 100
CHUNK = 1 << 22


def trigram_bits_per_byte(train: Iterable[bytes], validation: Iterable[bytes]) -> float:
    """Returns the cross-entropy, in bits per byte, of the documents `validation` under the trigram of `train`.

    The weights are fitted on every tenth document of `train`, or, where there are fewer, on the last tenth of each;
    the counts are then those of all of `train`. The ends of documents cost nothing. Both texts must hold some bytes.
    """
    documents = list(train)
    if len(documents) >= HELD_OUT:
        kept = [document for index, document in enumerate(documents) if index % HELD_OUT]
    else:
        kept = [document[: len(document) - len(document) // HELD_OUT] for document in documents]
    counts, kept_counts, text = count_trigrams(documents), count_trigrams(kept), count_trigrams(validation)
    assert counts.any() and text.any(), "a text is empty"
    weights = fit_weights(kept_counts, counts - kept_counts)
    seen = np.flatnonzero(text)
    return -float(text[seen] @ np.log2(probabilities(counts, weights, seen))) / int(text.sum())


def count_trigrams(documents: Iterable[bytes]) -> np.ndarray:
    """Returns how often each trigram occurs, uint32 (which suffices for 4 GiB of text)."""
    counts = np.zeros(NUM_SYMBOLS * NUM_SYMBOLS * NUM_BYTES, np.uint32)
    for chunk in _chunks(documents):
        third = np.frombuffer(b"".join(chunk), np.uint8).astype(np.int32)
        starts = np.cumsum([0] + [len(document) for document in chunk[:-1]])
        second, first = np.roll(third, 1), np.roll(third, 2)
        second[starts] = START
        first[starts] = START
        first[np.minimum(starts + 1, len(first) - 1)] = START  # where a document has one byte, the next starts here
        np.add.at(counts, (first * NUM_SYMBOLS + second) * NUM_BYTES + third, np.uint32(1))
    return counts


def probabilities(counts: np.ndarray, weights: np.ndarray, trigrams: np.ndarray) -> np.ndarray:
    """Returns the probability of the third byte of each trigram after its first two."""
    return _interpolate(_levels(counts, trigrams), weights)[-1]


def fit_weights(counts: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """Returns λ by order and bucket that make the text with the counts `held_out` likely, found by EM."""
    trigrams = np.flatnonzero(held_out)
    levels = _levels(counts, trigrams)
    weights = np.full((NUM_ORDERS, NUM_BUCKETS), 0.5)
    reached = np.zeros_like(weights)
    for _ in range(EM_STEPS):
        by_order = _interpolate(levels, weights)
        reach = held_out[trigrams].astype(float)  # expected number of bytes left to this order by the higher ones
        for order in reversed(range(NUM_ORDERS)):
            estimate, bucket = levels[order]
            taken = reach * weights[order, bucket] * (bucket > 0) * estimate / by_order[order + 1]
            reached[order] = np.bincount(bucket, reach, NUM_BUCKETS)
            # Half a byte added to either side keeps every λ below 1, and so every probability above 0.
            weights[order] = (np.bincount(bucket, taken, NUM_BUCKETS) + 0.5) / (reached[order] + 1)
            reach -= taken
    for order in range(NUM_ORDERS):  # buckets that the held-out text has not reached lie between those it has
        seen = 1 + np.flatnonzero(reached[order, 1:])
        if len(seen):
            weights[order] = np.interp(np.arange(NUM_BUCKETS), seen, weights[order, seen])
    return weights


def _chunks(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    chunk, size = [], 0
    for document in filter(None, documents):
        chunk.append(document)
        size += len(document)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _levels(counts: np.ndarray, trigrams: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns for unigram, bigram, trigram: count(context w) / count(context), and the bucket (0: unseen context)."""
    levels = []
    for order in range(NUM_ORDERS):
        table = counts.reshape(-1, NUM_SYMBOLS**order, NUM_BYTES).sum(0, dtype=np.uint32)
        total = table.sum(1, dtype=np.int64)
        mean = total / np.maximum(1, np.count_nonzero(table, axis=1))
        bucket = np.where(total > 0, 1 + np.log2(np.maximum(mean, 1)).astype(int), 0)
        context = trigrams // NUM_BYTES % NUM_SYMBOLS**order
        levels.append((table[context, trigrams % NUM_BYTES] / np.maximum(1, total[context]), bucket[context]))
    return levels


def _interpolate(levels: list[tuple[np.ndarray, np.ndarray]], weights: np.ndarray) -> list[np.ndarray]:
    """Returns p_0, p_1, p_2, p_3."""
    by_order = [np.full(len(levels[0][0]), 1 / NUM_BYTES)]
    for order, (estimate, bucket) in enumerate(levels):
        weight = weights[order, bucket] * (bucket > 0)
        by_order.append(weight * estimate + (1 - weight) * by_order[-1])
    return by_order

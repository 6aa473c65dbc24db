import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest

from transformer.data import ngram
from transformer.data.ngram import START, count_trigrams, fit_weights, probabilities, trigram_bits_per_byte

SOURCES = [path.read_bytes() for path in sorted(Path(json.__file__).parent.parent.glob("[a-h]*.py"))[:60]]


def code(first: int | str, second: int | str, third: str) -> int:
    one, two = (x if isinstance(x, int) else ord(x) for x in (first, second))
    return (one * 257 + two) * 256 + ord(third)


def shared(*weights: float) -> np.ndarray:
    return np.repeat(np.array(weights)[:, None], ngram.NUM_BUCKETS, axis=1)


def as_dictionary(counts: np.ndarray) -> dict[int, int]:
    return {int(index): int(counts[index]) for index in np.flatnonzero(counts)}


@pytest.mark.parametrize("chunk", [1, 3, 1 << 22])
def test_documents_do_not_run_into_each_other(monkeypatch, chunk):
    monkeypatch.setattr(ngram, "CHUNK", chunk)
    counts = count_trigrams(iter([b"abc", b"", b"x", b"y", b"abd", b"z"]))
    assert as_dictionary(counts) == {
        code(START, START, "a"): 2,
        code(START, "a", "b"): 2,
        code("a", "b", "c"): 1,
        code("a", "b", "d"): 1,
        code(START, START, "x"): 1,
        code(START, START, "y"): 1,
        code(START, START, "z"): 1,
    }


def test_probabilities_computed_by_hand():
    # "aab": a, a, b; after the start a; after a: a, b; after (start, start) a, (start, a) a, (a, a) b.
    counts = count_trigrams([b"aab"])
    weights = shared(0.2, 0.3, 0.4)
    unigram_a, unigram_b, unigram_z = 0.2 * 2 / 3 + 0.8 / 256, 0.2 * 1 / 3 + 0.8 / 256, 0.8 / 256
    expected = {
        code("a", "a", "b"): 0.4 * 1 + 0.6 * (0.3 * 1 / 2 + 0.7 * unigram_b),
        code("a", "a", "a"): 0.4 * 0 + 0.6 * (0.3 * 1 / 2 + 0.7 * unigram_a),
        code(START, START, "a"): 0.4 * 1 + 0.6 * (0.3 * 1 + 0.7 * unigram_a),
        code("z", "a", "b"): 0.3 * 1 / 2 + 0.7 * unigram_b,  # (z, a) was never seen, a was
        code("a", "z", "z"): unigram_z,  # nothing after z was ever seen
    }
    np.testing.assert_allclose(probabilities(counts, weights, np.array([*expected])), [*expected.values()], rtol=1e-14)


def test_equals_a_plain_implementation(monkeypatch):
    generator = np.random.default_rng(0)
    documents = [generator.integers(97, 102, n).astype(np.uint8).tobytes() for n in (0, 1, 2, 3, 40, 200)]
    held_out = [b"abcab", b"e", b"zz"]
    monkeypatch.setattr(ngram, "fit_weights", lambda *_: shared(0.9, 0.8, 0.7))
    seen: collections.Counter = collections.Counter()
    for document in documents:
        text = [START, START, *document]
        for i in range(2, len(text)):
            seen.update([tuple(text[i - n : i + 1]) for n in range(3)])
            seen.update([("context", *text[i - n : i]) for n in range(3)])
    bits, num_bytes = 0.0, 0
    for document in held_out:
        text = [START, START, *document]
        for i in range(2, len(text)):
            p = 1 / 256
            for n, weight in enumerate((0.9, 0.8, 0.7)):
                if total := seen["context", *text[i - n : i]]:
                    p = weight * seen[tuple(text[i - n : i + 1])] / total + (1 - weight) * p
            bits, num_bytes = bits - math.log2(p), num_bytes + 1
    assert trigram_bits_per_byte(documents, held_out) == pytest.approx(bits / num_bytes, rel=1e-12)


def test_probabilities_of_the_next_byte_sum_to_one():
    kept, held_out = count_trigrams(SOURCES[::2]), count_trigrams(SOURCES[1::2])
    weights = fit_weights(kept, held_out)
    generator = np.random.default_rng(0)
    contexts = np.concatenate(
        [
            generator.integers(0, 257 * 257, 300),  # mostly never seen
            generator.choice(np.flatnonzero(kept), 300) // 256,  # seen
            [START * 257 + START, START * 257 + ord("#")],
        ]
    )
    p = probabilities(kept, weights, (contexts[:, None] * 256 + np.arange(256)).ravel()).reshape(-1, 256)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    assert p.min() > 0, "a byte that was never seen costs bits, and not infinitely many"


def test_weights_are_the_most_likely_ones():
    kept, held_out = count_trigrams(SOURCES[::2]), count_trigrams(SOURCES[1::2])
    weights = fit_weights(kept, held_out)
    text = np.flatnonzero(held_out)

    def bits(weights: np.ndarray) -> float:
        return -float(held_out[text] @ np.log2(probabilities(kept, weights, text)))

    best = bits(weights)
    assert best < min(bits(shared(w, w, w)) for w in (0.3, 0.5, 0.7, 0.9, 0.99))
    for order, bucket in [(0, 10), (1, 3), (1, 6), (2, 1), (2, 2), (2, 4), (2, 6)]:
        for change in (-0.03, 0.03):
            moved = weights.copy()
            moved[order, bucket] = np.clip(moved[order, bucket] + change, 1e-9, 1 - 1e-9)
            assert bits(moved) >= best - 0.5, (order, bucket, change)


def test_weights_grow_with_the_evidence():
    weights = fit_weights(count_trigrams(SOURCES[::2]), count_trigrams(SOURCES[1::2]))
    assert np.all((weights > 0) & (weights < 1))
    assert weights[2, 1] < weights[2, 4] < weights[2, 7]


@pytest.mark.parametrize("num_documents", [1, 9, 40])
def test_weights_see_all_training_text_once_and_no_validation_text(monkeypatch, num_documents):
    train, validation = SOURCES[:num_documents], [b"\xff\xfe" * 100]
    given = {}

    def spy(kept: np.ndarray, held_out: np.ndarray) -> np.ndarray:
        given.update(kept=kept, held_out=held_out)
        return fit_weights(kept, held_out)

    monkeypatch.setattr(ngram, "fit_weights", spy)
    trigram_bits_per_byte(train, validation)
    np.testing.assert_array_equal(given["kept"] + given["held_out"], count_trigrams(train))
    assert 0.05 < given["held_out"].sum() / sum(map(len, train)) < 0.25


@pytest.mark.parametrize("num_documents", [1, 100])
def test_reaches_the_entropy_of_a_source_of_its_own_order(num_documents):
    generator = np.random.default_rng(1)
    law = generator.dirichlet(np.ones(4), (4, 4))
    text, bits = [0, 0], 0.0
    for u in generator.random(220_000):
        p = law[text[-2], text[-1]]
        text.append(min(3, int(np.searchsorted(np.cumsum(p), u))))
        if len(text) > 200_000:
            bits -= math.log2(p[text[-1]])
    data = bytes(text)
    train, validation = data[:200_000], data[200_000:]
    size = len(train) // num_documents
    documents = [train[i : i + size] for i in range(0, len(train), size)]
    entropy = bits / len(validation)
    assert entropy - 0.002 < trigram_bits_per_byte(documents, [validation]) < entropy + 0.01


def test_a_trigram_beats_lower_orders_on_real_text():
    train, validation = [x for i, x in enumerate(SOURCES) if i % 5], SOURCES[::5]
    got = trigram_bits_per_byte(train, validation)
    counts, text = count_trigrams(train), count_trigrams(validation)
    seen = np.flatnonzero(text)
    for weights in (shared(0.999, 0, 0), shared(0.999, 0.98, 0)):  # unigram, bigram
        assert got < -float(text[seen] @ np.log2(probabilities(counts, weights, seen))) / text.sum()
    assert 2 < got < 4


def test_one_short_document_is_enough():
    assert 0 < trigram_bits_per_byte([b"ab"], [b"ab"]) < 8


@pytest.mark.parametrize("train, validation", [([], [b"a"]), ([b"", b""], [b"a"]), ([b"a"], []), ([b"a"], [b""])])
def test_empty_text_is_refused(train, validation):
    with pytest.raises(AssertionError, match="empty"):
        trigram_bits_per_byte(train, validation)

"""Beam search against the enumeration of every text."""

from typing import Any

import numpy as np
import pytest
from tiny import ENDLESS, all_texts, build, log_softmax, uncached_logits

from transformer.data.plain_tokenizers import CharacterTokenizer
from transformer.data.tokenizers import BOS, EOS
from transformer.inference.beam import beam_search, length_penalty
from transformer.inference.generate import generate
from transformer.inference.sampling import Sampling
from transformer.inference.text import ends_of
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer

TWO = CharacterTokenizer("ab")
"""Four tokens that can be drawn: the end, the unknown, and two characters."""
TWO_ENDS = CharacterTokenizer("ab")
"""The same, but a text ends at a b too."""
TWO_ENDS.more_ends = tuple(TWO.encode("b").tolist())
PROMPTS = ("ab", "", "bbba")


def tiny(**changes: Any) -> tuple[Transformer, Tree]:
    """A model with a distribution flat enough that short and long texts are among the best."""
    model, params = build(vocab_size=TWO.vocab_size, seed=6, **changes)
    return model, params | {"head": params["head"] * 0.4}


def expected(
    model: Any, params: Any, prompt: str, max_tokens: int, alpha: float
) -> list[tuple[float, tuple[int, ...]]]:
    """Scores and tokens of all texts, best first."""
    texts = all_texts(model, params, TWO, prompt, max_tokens).items()
    return sorted(((score / ((5 + len(text)) / 6) ** alpha, text) for text, score in texts), reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 2.0])
@pytest.mark.parametrize("architecture", ["decoder", "encoder_decoder"])
def test_a_beam_as_wide_as_all_texts_finds_the_best_of_them(architecture: str, alpha: float) -> None:
    """V^T beams leave nothing out: the same texts in the same order, with the same scores, of three prompts at once.

    Among the best are texts that end early and texts that the limit ends.
    """
    model, params = tiny(architecture=architecture)
    found = beam_search(model, params, TWO, PROMPTS, 3, num_beams=4**3, num_best=8, alpha=alpha)
    ended = set()
    for prompt, texts in zip(PROMPTS, found, strict=True):
        best = expected(model, params, prompt, 3, alpha)
        assert [text.tokens for text in texts] == [
            tokens[: len(tokens) - (tokens[-1] == EOS)] for _, tokens in best[:8]
        ]
        np.testing.assert_allclose([text.score or 0 for text in texts], [score for score, _ in best[:8]], rtol=1e-4)
        assert [text.ended for text in texts] == [tokens[-1] == EOS for _, tokens in best[:8]]
        ended |= {(text.ended, len(text.tokens)) for text in texts}
    assert {True, False} == {is_end for is_end, _ in ended} and len(ended) > 2


def test_the_penalty_decides_between_short_and_long() -> None:
    model, params = tiny()
    lengths = []
    for alpha in (0.0, 2.0):
        found = beam_search(model, params, TWO, PROMPTS, 3, num_beams=4**3, num_best=8, alpha=alpha)
        lengths.append(np.mean([len(text.tokens) for texts in found for text in texts]))
    assert lengths[0] < lengths[1]
    assert length_penalty(1, 0.6) == 1 and length_penalty(7, 1.0) == 2


def narrow(
    model: Any, params: Any, tokenizer: Any, prompt: str, max_tokens: int, width: int, alpha: float
) -> tuple[float, tuple[int, ...]]:
    """Beam search by its definition, in dictionaries, without ever stopping early: best score and its tokens."""
    every, ends = all_texts(model, params, tokenizer, prompt, max_tokens), ends_of(tokenizer)
    count = (1 + len(ends)) * width

    def log_probability(text: tuple[int, ...]) -> float:
        if text in every:
            return every[text]
        return float(np.logaddexp.reduce([score for other, score in every.items() if other[: len(text)] == text]))

    beams, best = [()], (-np.inf, ())
    for length in range(1, max_tokens + 1):
        longer = sorted(((log_probability((*b, t)), (*b, t)) for b in beams for t in range(2, 6)), reverse=True)
        for score, text in longer[:count]:
            if text[-1] in ends or length == max_tokens:
                best = max(best, (score / ((5 + length) / 6) ** alpha, text))
        beams = [text for _, text in longer[:count] if text[-1] not in ends][:width]
    return best


@pytest.mark.parametrize(("alpha", "tokenizer"), [(0.0, TWO), (1.0, TWO), (1.0, TWO_ENDS)])
def test_a_narrow_beam_is_the_search_by_definition(alpha: float, tokenizer: Any) -> None:
    """Stopping early, of each prompt by itself, changes nothing."""
    model, params = tiny()
    found = beam_search(model, params, tokenizer, PROMPTS, 4, num_beams=2, alpha=alpha)
    for prompt, (text,) in zip(PROMPTS, found, strict=True):
        score, tokens = narrow(model, params, tokenizer, prompt, 4, 2, alpha)
        assert text.tokens == tokens[: len(tokens) - (tokens[-1] in ends_of(tokenizer))]
        assert text.score == pytest.approx(score, rel=1e-4)


def test_one_beam_is_greedy_through_caches_that_grow() -> None:
    """Where no text ends, nothing can be better than what goes on. One of the caches is a ring that is full in between."""
    model, params = build(layers="attention.window+attention", num_layers=2, window=34)
    prompts = ("dead beef", "", "bad")
    greedy = generate(model, params, ENDLESS, prompts, 40, Sampling(0.0))
    found = beam_search(model, params, ENDLESS, prompts, 40, num_beams=1)
    assert [text.tokens for (text,) in found] == [text.tokens for text in greedy]
    assert {len(text.tokens) for text in greedy} == {40}


def test_beams_follow_their_own_past() -> None:
    """Scores of long texts through reordered caches, rings and recurrent states among them: those of a forward pass over the text."""
    layers = {"layers": "attention.window+lstm/none", "encoder_layers": "attention", "window": 3, "num_layers": 2}
    model, params = build(architecture="encoder_decoder", **layers)
    (texts,) = beam_search(model, params, ENDLESS, ["bad cafe"], 12, num_beams=4, num_best=4, alpha=1.0)
    for text in texts:
        logits = uncached_logits(model, params, [[BOS, *text.tokens]], source="bad cafe", tokenizer=ENDLESS)
        scores = log_softmax(logits[0])
        total = sum(scores[place, token] for place, token in enumerate(text.tokens))
        assert text.score == pytest.approx(total * 6 / (5 + 12), rel=1e-4)
    assert len({text.tokens for text in texts}) == 4 and {len(text.tokens) for text in texts} == {12}

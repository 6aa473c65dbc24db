"""Speculative decoding: what comes out is what the model alone would write."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tiny import ENDLESS, SEVERAL, TOKENIZER, all_texts, build

from transformer.config import ConfigError
from transformer.data.plain_tokenizers import ByteTokenizer, CharacterTokenizer
from transformer.data.tokenizers import EOS
from transformer.inference.generate import generate
from transformer.inference.sampling import Sampling
from transformer.inference.speculative import check_draft, judge, speculate

PROMPTS = ("dead beef", "", "a faded cafe")
TWO = CharacterTokenizer("ab")


def test_what_is_judged_is_distributed_as_the_target() -> None:
    """First tokens of 20,000 rounds, for three pairs of distributions: Pearson's test at p = 0.001; and the share that
    stays is the overlap of the two (Leviathan et al., theorem 3.5)."""
    for seed in range(3):
        p, q = (scipy.stats.dirichlet.rvs([0.5] * 5, random_state=2 * seed + part)[0] for part in (0, 1))
        p[seed] = 0
        p /= p.sum()
        target, draft = jnp.log(jnp.asarray([p, p], jnp.float32)), jnp.log(jnp.asarray([q], jnp.float32))

        def first(key: jax.Array, target: jax.Array = target, draft: jax.Array = draft) -> tuple[jax.Array, jax.Array]:
            propose, check = jax.random.split(key)
            proposed = jax.random.categorical(propose, draft[0])[None]
            count, token = judge(draft, target, proposed, check)
            return jnp.where(count == 1, proposed[0], token), count

        tokens, counts = jax.jit(jax.vmap(first))(jax.random.split(jax.random.key(seed), 20_000))
        seen, kept = np.bincount(tokens, minlength=5), p > 0
        assert not np.any(seen[~kept])
        assert scipy.stats.chisquare(seen[kept], 20_000 * p[kept]).pvalue > 0.001
        assert scipy.stats.chisquare(seen, 20_000 * (q + 1e-9) / (q + 1e-9).sum()).pvalue < 0.001, "not the draft's"
        overlap = np.minimum(p, q).sum()
        assert abs(np.mean(counts) - overlap) < 4 * np.sqrt(overlap * (1 - overlap) / 20_000)


@pytest.mark.parametrize(
    "sampling",
    [
        pytest.param(Sampling(1.0), id="plain", marks=pytest.mark.slow),
        pytest.param(Sampling(0.7, top_k=3, min_p=0.05), id="temperature, top-k and min-p"),
    ],
)
def test_texts_are_distributed_as_those_of_the_model(sampling: Sampling) -> None:
    """1,536 texts of up to three tokens against the exact probability of each, by Pearson's test at p = 0.001.

    Texts that are expected less than five times are taken together. Plain drawing passes the same test, and the draft's
    own texts do not.
    """
    (model, params), (_, draft_params) = (build(seed, TWO.vocab_size) for seed in (6, 7))
    params, draft_params = (tree | {"head": tree["head"] * 0.4} for tree in (params, draft_params))
    probabilities = text_probabilities(model, params, sampling)
    rows = [(0, sample) for sample in range(1536)]
    prompts = ["ab"] * len(rows)
    options = {"seed": 1, "rows": rows}
    pair = ((model, model), (params, draft_params))
    texts, acceptance = speculate(*pair, TWO, prompts, 3, sampling, num_draft_tokens=2, **options)
    assert p_value(texts, probabilities) > 0.001
    assert 0.1 < acceptance.accepted / (2 * acceptance.rounds) < 0.95
    assert p_value(generate(model, params, TWO, prompts, 3, sampling, **options), probabilities) > 0.001
    assert p_value(generate(model, draft_params, TWO, prompts, 3, sampling, **options), probabilities) < 1e-6


@pytest.mark.parametrize(("limit", "accepted"), [(1, 0), (3, 2), (6, 4), (8, 6)])
def test_only_proposals_that_are_in_the_text_count(limit: int, accepted: int) -> None:
    """A model is its own draft, whose four tokens all stay: after each four one is the model's own, up to the limit."""
    model, params = build(6)
    given = ((model, model), (params, params), ENDLESS, ["ab"], limit, Sampling(0.0))
    texts, acceptance = speculate(*given, num_draft_tokens=4)
    assert len(texts[0].tokens) == limit and acceptance.accepted == accepted


def text_probabilities(model: Any, params: Any, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """Exact probability of each text, from those of the unfiltered model: conditionals are cut by the definitions."""
    plain = {text: np.exp(score) for text, score in all_texts(model, params, TWO, "ab", 3).items()}
    found: dict[tuple[int, ...], float] = {}
    for text in plain:
        probability = 1.0
        for place, token in enumerate(text):
            weights = np.zeros(6)
            for other, share in plain.items():
                if other[:place] == text[:place]:
                    weights[other[place]] += share
            weights = weights ** (1 / sampling.temperature)
            weights /= weights.sum()
            ranks = np.argsort(np.argsort(-weights))
            is_kept = (weights >= sampling.min_p * weights.max()) & ((ranks < sampling.top_k) | (sampling.top_k == 0))
            weights = np.where(is_kept, weights, 0)
            probability *= weights[token] / weights.sum()
        found[text] = probability
    assert np.isclose(sum(found.values()), 1)
    return found


def p_value(texts: Any, probabilities: dict[tuple[int, ...], float]) -> float:
    counts = dict.fromkeys(probabilities, 0)
    for text in texts:
        counts[(*text.tokens, EOS) if text.ended else text.tokens] += 1
    expected = {text: share * len(texts) for text, share in probabilities.items()}
    if any(counts[text] for text, number in expected.items() if number == 0):
        return 0.0
    often = [text for text, number in expected.items() if number >= 5]
    seen, wanted = [counts[text] for text in often], [expected[text] for text in often]
    if (rest := len(texts) - sum(wanted)) > 1e-3 * len(texts):
        seen, wanted = [*seen, len(texts) - sum(seen)], [*wanted, rest]
    assert len(wanted) > 10
    return scipy.stats.chisquare(seen, np.array(wanted) * sum(seen) / sum(wanted)).pvalue


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {
                "architecture": "encoder_decoder",
                "layers": "attention.window+lstm/none",
                "encoder_layers": "attention",
                "num_layers": 2,
                "num_encoder_layers": 1,
                "window": 6,
                "num_sinks": 2,
            },
            marks=pytest.mark.slow,
        ),
    ],
    ids=["decoder", "encoder-decoder with a window and a recurrence"],
)
def test_greedy_texts_are_those_of_the_model(changes: dict[str, Any]) -> None:
    """Also through caches that cannot take a token back; with a draft that is often right, always right, and hardly."""
    model, params = build(**changes)
    noise = jax.tree.map(lambda leaf: 0.05 * jax.random.normal(jax.random.key(1), leaf.shape), params)
    drafts = {"close": jax.tree.map(jnp.add, params, noise), "same": params, "other": build(seed=9, **changes)[1]}
    sampling = Sampling(0.0, repetition_penalty=1.3)
    expected = generate(model, params, TOKENIZER, PROMPTS, 20, sampling)
    found, worth = {}, {}
    for name, draft_params in drafts.items():
        given = ((model, model), (params, draft_params), TOKENIZER, PROMPTS, 20, sampling)
        found[name], acceptance = speculate(*given, num_draft_tokens=3)
        worth[name] = acceptance.tokens_per_round
    assert found == dict.fromkeys(drafts, expected)
    assert max(len(text.tokens) for text in expected) > 8
    assert 1 <= worth["other"] < worth["close"] <= worth["same"] <= 4


def test_a_row_depends_on_its_numbers_alone_and_stops_at_stop_strings() -> None:
    model, params = build()
    draft_params = build(seed=9)[1]

    def texts(prompts: Any, **options: Any) -> Any:
        given = ((model, model), (params, draft_params), TOKENIZER, prompts, 20, Sampling(1.5))
        return speculate(*given, num_draft_tokens=3, **options)[0]

    together = texts(PROMPTS, seed=3)
    assert texts(PROMPTS[::-1], seed=3, rows=[(2, 0), (1, 0), (0, 0)]) == together[::-1]
    assert texts(PROMPTS, seed=4) != together
    longest = max((text.text for text in together), key=len)
    stop = longest[len(longest) // 2 :][:2]
    assert len(stop) == 2
    stopped = texts(PROMPTS, seed=3, stop=[stop])
    assert [text.text for text in stopped] == [text.text.partition(stop)[0] for text in together]
    given = ((model, model), (params, draft_params), SEVERAL, PROMPTS, 20, Sampling(1.5))
    several = speculate(*given, num_draft_tokens=3, seed=3)[0]
    assert (
        [text.text for text in several]
        == [text.text.partition("a")[0] for text in together]
        != [text.text for text in together]
    )


def test_drafts_that_do_not_fit() -> None:
    model, draft = build()[0], build(seed=9)[0]
    check_draft(model, TOKENIZER, draft, TOKENIZER, 4)
    with pytest.raises(ConfigError, match="the draft has another tokenizer, of 260 tokens, not the 13 of the model"):
        check_draft(model, TOKENIZER, draft, ByteTokenizer(), 4)
    reader = build(architecture="encoder_decoder")[0]
    with pytest.raises(ConfigError, match="both must read prompts in the same way"):
        check_draft(model, TOKENIZER, reader, TOKENIZER, 4)
    ring = build(layers="attention.window", window=4)[0]
    check_draft(ring, TOKENIZER, draft, TOKENIZER, 3)
    with pytest.raises(ConfigError, match=r"--draft-tokens = 4: must be below model.window = 4"):
        check_draft(model, TOKENIZER, ring, TOKENIZER, 4)
    short, params = build(positions="learned", num_positions=16)
    given = ((model, short), (build()[1], params), TOKENIZER, ["dead beef"], 20, Sampling(0.0))
    with pytest.raises(ConfigError, match=r"the draft: a prompt of 10 tokens and 20 new ones"):
        speculate(*given)

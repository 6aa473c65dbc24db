"""Objectives on running text: what becomes of windows of documents, and what is asked of the model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import OBJECTIVE_DATA, Config, ConfigError, problems_of, replace
from transformer.data.plain_tokenizers import ByteTokenizer, CharacterTokenizer
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer
from transformer.objectives import OBJECTIVES, objective_of, span_corruption, with_window
from transformer.objectives import mixture_of_denoisers as mixture
from transformer.objectives.objective import ExampleMaker
from transformer.training.step import make_gradient

TOKENIZER = ByteTokenizer()
TEXT = ("fill_in_the_middle", "masked_lm", "mixture_of_denoisers", "multi_token", "prefix_lm", "span_corruption")
NEEDS: dict[str, dict[str, Any]] = {
    "masked_lm": {"architecture": "encoder"},
    "multi_token": {"num_future_tokens": 2},
    "span_corruption": {"architecture": "encoder_decoder"},
    "mixture_of_denoisers": {"architecture": "encoder_decoder"},
}


def config_of(name: str, length: int = 64, **objective: Any) -> Config:
    data = {"sequence_length": length, "tokenizer": "bytes"}
    return replace(Config(), objective={"name": name, **objective}, data=data, model=NEEDS.get(name, {}))


def window_of(length: int, rng: np.random.Generator, documents: int = 3) -> dict[str, np.ndarray]:
    """A window of several documents; the last goes on after it, unless there are four."""
    starts = np.sort(rng.choice(np.arange(1, length), documents - 1, replace=False))
    begins = np.isin(np.arange(length + 1), [0, *starts, *([length] if documents == 4 else [])])
    tokens = np.where(begins, TOKENIZER.bos, rng.integers(4, 260, length + 1)).astype(np.int32)
    number = np.cumsum(begins)
    position = np.arange(length + 1) - np.maximum.accumulate(np.where(begins, np.arange(length + 1), 0))
    same = (number[1:] == number[:-1]).astype(np.float32)
    row = {"inputs": tokens[:-1], "targets": tokens[1:], "positions": position[:-1], "segment_ids": number[:-1]}
    return row | {"weights": same}


def put_back(source: np.ndarray, target: np.ndarray, first_mark: int) -> np.ndarray:
    """Returns the text from which spans were removed."""
    marks = np.flatnonzero(target >= first_mark)
    spans = {int(part[0]): part[1:] for part in np.split(target, marks)[1:]}
    return np.concatenate([spans.get(int(token), np.array([token])) for token in source])


def made(config: Config, window: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    return objective_of(config).example(config, TOKENIZER, window, np.random.default_rng(seed))


@pytest.mark.parametrize("name", TEXT)
def test_rows_fit_their_arrays_and_depend_on_the_generator_alone(name):
    config = config_of(name)
    assert problems_of(config) == []
    objective = objective_of(config)
    maker = ExampleMaker(objective, config, TOKENIZER)
    rng = np.random.default_rng(0)
    sizes = {key: length for key, (length, _) in maker.arrays.items()}
    for seed in range(40):
        window = window_of(objective.window_length(config), rng, documents=1 + seed % 4)
        row = maker(window, np.random.default_rng(seed))
        assert set(row) == set(sizes)
        assert all(len(values) <= sizes[key] for key, values in row.items())
        assert all(np.array_equal(row[key], again) for key, again in made(config, window, seed).items())
        extra = objective.num_extra_tokens(config)
        for key in row:
            if key.endswith("inputs") or key == "targets":
                assert np.all((row[key] >= 0) & (row[key] < TOKENIZER.vocab_size + extra)), key
    assert maker({k: v[:1] for k, v in window_of(4, rng).items()}, rng) is not None


@pytest.mark.parametrize("name", TEXT)
def test_a_gradient_of_microbatches_is_that_of_the_batch(name):
    """Each objective's terms add up over parts of a batch, and a model of its architecture learns from them."""
    length = 24
    config = config_of(name, length)
    objective, rng = objective_of(config), np.random.default_rng(1)
    model = {"num_layers": 1, "width": 16, "num_heads": 2, "initial_scale": 0.1, "scan_layers": False}
    vocab_size = TOKENIZER.vocab_size + objective.num_extra_tokens(config)
    config = replace(config, model={**model, "vocab_size": vocab_size}, train={"batch_size": 4})
    maker = ExampleMaker(objective, config, TOKENIZER)
    batch = {key: np.zeros((4, size), dtype) for key, (size, dtype) in maker.arrays.items()}
    for number in range(4):
        window = window_of(objective.window_length(config), rng, documents=1 + number)
        for key, values in maker(window, rng).items():
            batch[key][number, : len(values)] = values
    network = Transformer(config.model)
    params = init_parameters(network, jax.random.key(0))
    whole, split = (
        jax.jit(make_gradient(replace(config, train={"num_microbatches": parts}), network))(params, batch, None)
        for parts in (1, 4)
    )
    assert float(whole[1]["cross_entropy"]) == pytest.approx(np.log(vocab_size), rel=0.2)
    for key, value in whole[1].items():
        np.testing.assert_allclose(split[1][key], value, rtol=1e-5, err_msg=key)
    for one, other in zip(jax.tree.leaves(whole[0]), jax.tree.leaves(split[0]), strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one) + 1e-9


# Span corruption.


def test_span_corruption_has_the_numbers_of_t5():
    """568 tokens, 15% in spans of 3 on average: 512 to read and 114 to write."""
    config = replace(config_of("span_corruption", 114), data={"source_length": 512})
    assert objective_of(config).window_length(config) == 568
    row = made(config, window_of(568, np.random.default_rng(0)))
    assert (len(row["encoder_inputs"]), len(row["targets"])) == (512, 114)
    assert row["encoder_inputs"][-1] == row["targets"][-1] == TOKENIZER.eos
    assert row["inputs"].tolist() == [TOKENIZER.bos, *row["targets"][:-1]]
    assert np.sum(row["targets"] >= TOKENIZER.vocab_size) == 28
    # A target that has less room makes the window shorter.
    shorter = replace(config, data={"sequence_length": 60})
    row = made(shorter, window_of(objective_of(config).window_length(shorter), np.random.default_rng(0)))
    assert 57 <= len(row["targets"]) <= 60


@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.5, 1.5), (0.9, 20.0), (0.15, 64.0)])
def test_removed_spans_can_be_put_back(rate, mean):
    spans, rng = span_corruption.Spans(rate, mean), np.random.default_rng(2)
    for length in (2, 3, 10, 101):
        for _ in range(50):
            tokens = rng.integers(4, 260, length).astype(np.int32)
            source, target = span_corruption.remove_spans(tokens, spans, 260, rng)
            assert put_back(source, target, 260).tolist() == tokens.tolist()
            removed, count = spans.counts(length)
            marks = source[source >= 260]
            assert marks.tolist() == target[target >= 260].tolist() == list(range(260, 260 + count))
            assert len(target) - count == removed and len(source) + len(target) == length + 2 * count
            assert (len(source) + 1, len(target) + 1) == spans.lengths(length)


def test_lengths_of_spans_are_spread_as_every_cut_is_as_likely():
    """Of the 6 ways to cut 5 into 3 parts each comes up a sixth of the time."""
    rng = np.random.default_rng(3)
    cuts = [tuple(span_corruption._cut(5, 3, rng)) for _ in range(6000)]
    found = {cut: cuts.count(cut) for cut in set(cuts)}
    assert len(found) == 6
    assert all(abs(count - 1000) < 4 * np.sqrt(6000 * 5 / 36) for count in found.values())


def test_lengths_too_short_to_remove_anything_are_refused():
    config = replace(config_of("span_corruption", 2), data={"source_length": 3})
    with pytest.raises(ConfigError, match=r"data.source_length = 3 and data.sequence_length = 2 are too short"):
        objective_of(config).window_length(config)


def test_a_mixture_of_denoisers_draws_them_all_alike_and_says_which():
    config = config_of("mixture_of_denoisers", 128)
    length, rng = objective_of(config).window_length(config), np.random.default_rng(4)
    first_mark, modes, shares = 260 + 3, [], {mode: [] for mode in range(3)}
    for seed in range(700):
        window = window_of(length, rng)
        row = made(config, window, seed)
        mode = int(row["encoder_inputs"][0]) - 260
        source, target = row["encoder_inputs"][1:-1], row["targets"][:-1]
        assert put_back(source, target, first_mark).tolist() == window["inputs"].tolist()
        modes.append(mode)
        shares[mode].append(np.mean(target < first_mark))
        if mode == mixture.MODES.index("sequential"):
            assert source[-1] == target[0] == first_mark and np.sum(target >= first_mark) == 1
    counts = np.bincount(modes, minlength=3)
    expected = 700 * np.array([2, 4, 1]) / 7
    assert np.sum((counts - expected) ** 2 / expected) < 13.8  # chi-squared, 2 degrees of freedom, p = 0.001


# Masked language modelling.


def test_masking_rates_are_those_of_bert():
    config = config_of("masked_lm", 512)
    rng = np.random.default_rng(5)
    counts = np.zeros(4)  # text, chosen, masked, changed to another token
    unchosen_changed = 0
    for seed in range(100):
        window = window_of(512, rng)
        row = made(config, window, seed)
        chosen, text = row["weights"] == 1, window["inputs"] != TOKENIZER.bos
        changed = row["inputs"] != window["inputs"]
        masked = row["inputs"] == TOKENIZER.vocab_size
        counts += [text.sum(), chosen.sum(), (chosen & masked).sum(), (chosen & changed & ~masked).sum()]
        unchosen_changed += np.sum(changed & ~chosen)
        assert not np.any(chosen & ~text)
        assert np.array_equal(row["targets"], window["inputs"])
    assert unchosen_changed == 0
    text, chosen, masked, other = counts
    # A random token is the same one as before once in 260 draws.
    for found, total, share in ((chosen, text, 0.15), (masked, chosen, 0.8), (other, chosen, 0.1 * 259 / 260)):
        assert abs(found / total - share) < 3 * np.sqrt(share * (1 - share) / total)


def test_a_vocabulary_may_have_a_mask_of_its_own():
    window = window_of(64, np.random.default_rng(0))
    usual, own = (made(config_of("masked_lm", mask_rate=0.5, mask_token=token), window) for token in (None, 3))
    masked = usual["inputs"] == TOKENIZER.vocab_size
    assert masked.any() and np.array_equal(own["inputs"], np.where(masked, 3, usual["inputs"]))
    counts = [objective_of(it).num_extra_tokens(it) for it in map(config_of_mask, (None, 3))]
    assert counts == [1, 0]


def config_of_mask(token: int | None) -> Config:
    return config_of("masked_lm", mask_token=token)


@pytest.mark.parametrize("name", ["span_corruption", "mixture_of_denoisers"])
def test_what_is_written_may_begin_with_another_token(name):
    window, config = window_of(64, np.random.default_rng(0)), config_of(name)
    usual = made(config, window)
    other = made(replace(config, model={"decoder_start_token": 0}), window)
    assert usual["inputs"][0] == TOKENIZER.bos and other["inputs"][0] == 0
    assert np.array_equal(usual["inputs"][1:], other["inputs"][1:])


def test_whole_words_are_chosen_whole():
    tokenizer = CharacterTokenizer("abcdefgh ")
    config = config_of("masked_lm", 256, whole_words=True, mask_rate=0.3)
    rng = np.random.default_rng(6)
    words = [" ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 6))) for _ in range(30)) for _ in range(40)]
    num_chosen = num_words = 0
    for seed, text in enumerate(words):
        ids = tokenizer.encode(text)
        window = {"inputs": ids, "targets": ids, "positions": np.arange(len(ids))}
        window |= {"segment_ids": np.ones(len(ids), int), "weights": np.ones(len(ids))}
        chosen = objective_of(config).example(config, tokenizer, window, np.random.default_rng(seed))["weights"]
        place = 0
        for word in text.split(" "):
            own = chosen[place : place + len(word)]
            assert own.min() == own.max(), (text, word)
            num_chosen, num_words = num_chosen + own[0], num_words + 1
            place += len(word) + 1
    assert abs(num_chosen / num_words - 0.3) < 3 * np.sqrt(0.3 * 0.7 / num_words)


# Filling in the middle.


def whole_again(tokens: np.ndarray, first_mark: int) -> np.ndarray:
    """Returns the text that was taken apart, without its end; or its tokens, if it was not."""
    begin = tokens[:1] if tokens[0] == TOKENIZER.bos else tokens[:0]
    tokens = tokens[len(begin) :]
    if not len(tokens) or tokens[0] != first_mark:
        return np.concatenate([begin, tokens])
    after, between = (int(np.flatnonzero(tokens == first_mark + mark)[0]) for mark in (1, 2))
    return np.concatenate([begin, tokens[1:after], tokens[between + 1 : -1], tokens[after + 1 : between]])


@pytest.mark.parametrize("suffix_first", [0.0, 1.0, 0.5])
def test_filling_in_the_middle_restores_every_document(suffix_first):
    config = config_of("fill_in_the_middle", 128, middle_rate=0.7, suffix_first_rate=suffix_first)
    length, rng = objective_of(config).window_length(config), np.random.default_rng(7)
    assert length == 120
    taken_apart = total = 0
    for seed in range(200):
        window = window_of(length, rng, documents=1 + seed % 4)
        if seed % 2:
            # As documents end: where another begins, and here at the end of the row too.
            window["inputs"][np.append(window["segment_ids"][1:] > window["segment_ids"][:-1], True)] = TOKENIZER.eos
            window["targets"][:-1] = window["inputs"][1:]
            window["weights"][-1] = 0
        row = made(config, window, seed)
        for segment in range(1, 2 + seed % 4):
            own, new = window["segment_ids"] == segment, row["segment_ids"] == segment
            # The token after the last belongs to the document only where it has weight.
            before, after = window["inputs"][own], row["inputs"][new]
            if window["weights"][own][-1]:
                before, after = np.append(before, window["targets"][own][-1]), np.append(after, row["targets"][new][-1])
            is_apart = 260 in after
            assert whole_again(after, 260).tolist() == before[: -1 if is_apart and seed % 2 else None].tolist()
            if before[0] == TOKENIZER.bos:
                assert after[0] == TOKENIZER.bos
            np.testing.assert_array_equal(row["targets"][new][:-1], row["inputs"][new][1:])
            assert row["weights"][new][:-1].all() and row["weights"][new][-1] == window["weights"][own][-1]
            assert row["positions"][new].tolist() == list(range(new.sum()))
            if is_apart:
                place = int(np.flatnonzero(after == 260)[0])
                assert (after[place + 1] == 261) >= (suffix_first == 1.0)
                assert after.tolist().index(TOKENIZER.eos) == len(after) - 1
            taken_apart, total = taken_apart + is_apart, total + 1
    # Two marks' room for each window: with more documents some stay whole.
    assert 0.4 < taken_apart / total < 0.7


def test_documents_that_are_not_taken_apart_stay_as_they_are():
    config = config_of("fill_in_the_middle", 128, middle_rate=0.0)
    window = window_of(120, np.random.default_rng(8))
    row = made(config, window)
    for key in ("inputs", "positions", "segment_ids", "weights"):
        assert row[key].tolist() == window[key].tolist(), key


# Prefixes and further tokens.


def test_prefixes_are_the_beginnings_of_documents_and_are_not_asked_for():
    config, rng = config_of("prefix_lm"), np.random.default_rng(9)
    shares = []
    for seed in range(300):
        window = window_of(64, rng)
        row = made(config, window, seed)
        for segment in (1, 2, 3):
            own = window["segment_ids"] == segment
            prefix, size = row["prefix"][own], int(own.sum())
            seen = int(prefix.sum())
            assert prefix[:seen].all() and seen < size
            expected = window["weights"][own] * (np.arange(1, size + 1) >= seen)
            assert row["weights"][own].tolist() == expected.tolist()
            if size > 20:
                shares.append(seen / size)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


def test_further_tokens_count_within_their_document():
    """Against a loop: the k-th further token of position i is that of i + 1 + k, if all up to it are of one document."""
    from transformer.models.transformer import Outputs

    rng = np.random.default_rng(10)
    windows = [window_of(12, rng, documents) for documents in (1, 3, 4)]
    batch = {key: jnp.asarray(np.stack([window[key] for window in windows])) for key in windows[0]}
    states = [jnp.asarray(rng.standard_normal((3, 12, 8)), jnp.float32) for _ in range(3)]
    table = rng.standard_normal((8, 260))
    outputs = Outputs(states[0], lambda hidden: hidden @ table, future=lambda following: (states[1:], {}))
    terms = objective_of(config_of("multi_token")).terms(
        config_of("multi_token", future_weight=0.5).objective, outputs, batch
    )
    for k in (1, 2):
        logits = np.asarray(states[k], np.float64) @ table
        losses = np.log(np.exp(logits).sum(-1))
        value = weight = 0.0
        for row, i in np.ndindex(3, 12 - k):
            if all(windows[row]["weights"][i : i + k + 1]):
                value += losses[row, i] - logits[row, i, windows[row]["targets"][i + k]]
                weight += 1
        assert float(terms.losses[f"future_{k}"][1]) == weight
        assert float(terms.losses[f"future_{k}"][0]) == pytest.approx(0.25 * value, rel=1e-5)


def test_label_smoothing_is_the_cross_entropy_of_a_mixed_distribution():
    from transformer.models.transformer import MASKED_LOGIT, Outputs
    from transformer.objectives.cross_entropy import token_terms

    rng = np.random.default_rng(11)
    logits = rng.standard_normal((2, 5, 8))
    logits[..., 6:] = MASKED_LOGIT
    batch = {
        "targets": jnp.asarray(rng.integers(0, 6, (2, 5))),
        "weights": jnp.asarray(rng.random((2, 5)) < 0.7, float),
    }
    outputs = Outputs(jnp.asarray(logits, jnp.float32), lambda hidden: hidden)
    smooth = replace(Config(), objective={"label_smoothing": 0.1}).objective
    losses = token_terms(smooth, outputs, batch).losses
    log_p = logits[..., :6] - np.log(np.exp(logits[..., :6]).sum(-1, keepdims=True))
    target = 0.9 * np.eye(6)[np.asarray(batch["targets"])] + 0.1 / 6
    expected = -np.sum(np.sum(target * log_p, axis=-1) * np.asarray(batch["weights"]))
    assert float(losses["cross_entropy"][0] + losses["label_smoothing"][0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_an_objective_needs_of_the_model_is_told(name):
    wrong = {"decoder": "encoder", "encoder": "encoder_decoder", "encoder_decoder": "decoder"}
    good = NEEDS.get(name, {}).get(
        "architecture", "encoder_decoder" if name in ("seq2seq", "text_to_text") else "decoder"
    )
    labelled = OBJECTIVE_DATA.get(name) == "labelled"
    other = "encoder_decoder" if labelled else wrong[good]
    config = replace(Config(), objective={"name": name}, model={**NEEDS.get(name, {}), "architecture": other})
    found = [problem for problem in problems_of(config) if problem.startswith("model.architecture")]
    assert len(found) == 1 and f"objective.name = {name!r} needs '{good}'" in found[0].replace("'encoder' or ", "")
    heads = replace(Config(), objective={"name": "multi_token"})
    assert any("model.num_future_tokens = 0" in problem for problem in problems_of(heads))


def test_more_text_than_an_example_holds_is_refused():
    config = config_of("fill_in_the_middle", 128)
    assert with_window(config).data.window_length == 120
    assert with_window(replace(config, data={"window_length": 100})).data.window_length == 100
    with pytest.raises(ConfigError, match="window_length = 121: an example holds 120 tokens of text at most"):
        with_window(replace(config, data={"window_length": 121}))

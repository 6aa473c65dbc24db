"""Direct preference optimisation: its loss against NumPy, its parts against the whole, its rows against rows of their own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import Config, ModelConfig, problems_of, replace
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Outputs, Transformer, apply
from transformer.objectives import normalize, objective_of
from transformer.objectives.dpo import segment_scores
from transformer.training.step import make_gradient

Batch = dict[str, Any]
LENGTH, VOCABULARY = 16, 19


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(
        ModelConfig(vocab_size=VOCABULARY, num_layers=1, width=16, num_heads=2, initial_scale=0.5, scan_layers=False)
    )


@pytest.fixture(scope="module")
def params(model: Transformer) -> Any:
    return init_parameters(model, jax.random.key(0))


@pytest.fixture(scope="module")
def gradient(model: Transformer) -> Callable[..., Any]:
    return jax.jit(make_gradient(config_of(), model))


def config_of(**objective: Any) -> Config:
    return replace(
        Config(), objective={"name": "dpo", **objective}, data={"sequence_length": LENGTH}, train={"batch_size": 4}
    )


def pairs_of(seed: int, sizes: list[list[int]]) -> Batch:
    """A batch with rows of segments of these sizes, the second half of each learned, and a reference."""
    rng = np.random.default_rng(seed)
    batch: Batch = {
        name: np.zeros((len(sizes), LENGTH), np.int32) for name in ("inputs", "targets", "positions", "segment_ids")
    }
    batch |= {name: np.zeros((len(sizes), LENGTH), np.float32) for name in ("weights", "reference")}
    for row, segments in enumerate(sizes):
        place = 0
        for number, size in enumerate(segments):
            tokens, here = rng.integers(4, VOCABULARY, size + 1), slice(place, place + size)
            batch["inputs"][row, here], batch["targets"][row, here] = tokens[:-1], tokens[1:]
            batch["positions"][row, here], batch["segment_ids"][row, here] = np.arange(size), number + 1
            batch["weights"][row, place + size // 2 : place + size] = 1
            batch["reference"][row, number] = -3 * rng.random() - size
            place += size
    return batch


SIZES = [[3, 4, 2, 5], [8, 8], [2, 3], []]


def scores_of(logits: np.ndarray, batch: Batch) -> list[list[float]]:
    """The log-probability of each segment of each row, in double precision."""
    found = []
    for row, (row_logits, segments) in enumerate(zip(logits.astype(np.float64), batch["segment_ids"], strict=True)):
        log = row_logits - np.log(np.exp(row_logits).sum(-1, keepdims=True))
        said = log[np.arange(LENGTH), batch["targets"][row]] * batch["weights"][row]
        found.append([float(said[segments == number].sum()) for number in range(1, segments.max() + 1)])
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"dpo_beta": 0.5, "label_smoothing": 0.2}, {"dpo_loss": "ipo", "dpo_beta": 0.3}, {"logit_chunk": 5}],
    ids=["dpo", "cdpo", "ipo", "chunks"],
)
def test_the_loss_is_that_of_the_papers(options: dict[str, Any]) -> None:
    config, batch = config_of(**options), pairs_of(0, SIZES)
    rng = np.random.default_rng(1)
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, LENGTH, 8), (8, VOCABULARY)))
    outputs = Outputs(hidden, lambda hidden: hidden @ table)
    logits, given = np.array(hidden @ table), {name: jnp.asarray(values) for name, values in batch.items()}
    terms = objective_of(config).terms(config.objective, outputs, given)
    beta, smoothing = config.objective.dpo_beta, config.objective.label_smoothing
    losses, margins = [], []
    for row, scores in enumerate(scores_of(logits, batch)):
        ratios = [score - reference for score, reference in zip(scores, batch["reference"][row], strict=False)]
        for chosen, rejected in zip(ratios[::2], ratios[1::2], strict=True):
            margin = chosen - rejected
            sigmoid = 1 / (1 + np.exp(-beta * margin))
            loss = -(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid)
            losses.append((margin - 1 / (2 * beta)) ** 2 if "dpo_loss" in options else loss)
            margins.append(beta * margin)
    assert len(losses) == 4 and float(terms.losses["dpo"][1]) == 4
    loss, told = normalize(terms.losses | terms.statistics)
    np.testing.assert_allclose(told["dpo"], np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(told["reward_margin"], np.mean(margins), rtol=1e-4)
    np.testing.assert_allclose(told["reward_chosen"] - told["reward_rejected"], np.mean(margins), rtol=1e-4, atol=1e-5)
    assert float(told["preferred"]) == np.mean(np.array(margins) > 0)


def refer(model: Transformer, params: Any, batch: Batch) -> None:
    """Makes the model itself the reference of a batch."""
    score = jax.jit(lambda params, batch: segment_scores(config_of().objective, apply(model, params, batch), batch))
    batch["reference"] = np.array(score(params, batch))


def close(one: Any, other: Any) -> None:
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b) + 1e-9


def test_microbatches_with_uneven_numbers_of_pairs_give_the_gradient_of_the_whole(
    model: Transformer, params: Any, gradient: Callable[..., Any]
) -> None:
    batch = pairs_of(1, SIZES)
    config = replace(config_of(), train={"num_microbatches": 4})
    gradients, told = jax.jit(make_gradient(config, model))(params, batch, None, 4)
    expected, told_whole = gradient(params, batch, None, 1)
    close(gradients, expected)
    for name in ("loss", "dpo", "reward_margin", "preferred"):
        np.testing.assert_allclose(told[name], told_whole[name], rtol=1e-5)


def test_packed_pairs_are_those_of_rows_of_their_own(params: Any, gradient: Callable[..., Any]) -> None:
    packed = pairs_of(2, [[3, 4, 2, 5], [2, 3, 4, 4], [], []])
    alone: Batch = {name: np.zeros((4, LENGTH), values.dtype) for name, values in packed.items()}
    for row in range(4):
        source, pair = row // 2, row % 2
        ids = packed["segment_ids"][source]
        here = (ids == 2 * pair + 1) | (ids == 2 * pair + 2)
        for name in alone:
            values = packed[name][source]
            values = (
                values[2 * pair : 2 * pair + 2]
                if name == "reference"
                else values[here] - (2 * pair if name == "segment_ids" else 0)
            )
            alone[name][row, : len(values)] = values
    (one, told), (other, told_alone) = gradient(params, packed, None, 1), gradient(params, alone, None, 1)
    close(one, other)
    np.testing.assert_allclose(told["dpo"], told_alone["dpo"], rtol=1e-6)


def test_where_the_reference_is_the_model_itself_the_loss_is_log_2(
    model: Transformer, params: Any, gradient: Callable[..., Any]
) -> None:
    batch = pairs_of(3, SIZES)
    refer(model, params, batch)
    np.testing.assert_allclose(gradient(params, batch, None, 1)[1]["loss"], np.log(2), rtol=1e-6)


def test_the_margin_of_a_preference_rises(model: Transformer, params: Any, gradient: Callable[..., Any]) -> None:
    """Steps of plain descent on pairs in which one token is preferred to another."""
    batch = pairs_of(4, [[4, 4, 4, 4]] * 4)
    odd = batch["segment_ids"] % 2 == 1
    batch["targets"] = np.where(batch["weights"] > 0, np.where(odd, 7, 8), batch["targets"]).astype(np.int32)
    refer(model, params, batch)
    margins, current = [], params
    for _ in range(8):
        gradients, told = gradient(current, batch, None, 1)
        margins.append(float(told["reward_margin"]))
        current = jax.tree.map(lambda p, g: p - g, current, gradients)
    assert margins[0] == pytest.approx(0, abs=1e-5) and all(np.diff(margins) > 0) and margins[-1] > 1
    assert float(told["preferred"]) == 1


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"label_smoothing": 0.5}, "objective.label_smoothing = 0.5: with 'dpo' it must be below 0.5"),
        (
            {"label_smoothing": 0.1, "dpo_loss": "ipo"},
            "objective.label_smoothing = 0.1: objective.dpo_loss = 'ipo' has none",
        ),
        ({"z_loss": 1e-4}, "objective.z_loss = 0.0001: objective.name = 'dpo' has no such term"),
        ({"dpo_beta": 0.0}, "objective.dpo_beta = 0.0: must be greater than 0"),
    ],
)
def test_what_it_has_no_use_for_is_told(objective: dict[str, Any], message: str) -> None:
    (problem,) = problems_of(replace(config_of(**objective), data={"path": ("a.jsonl",)}))
    assert problem.startswith(message)


def test_conversations_need_a_decoder_and_a_template() -> None:
    chat = replace(Config(), objective={"name": "chat"})
    assert problems_of(chat)[0].startswith("data.chat_template is needed: objective.name = 'chat'")
    chat = replace(chat, data={"chat_template": "plain"})
    assert problems_of(chat) == []
    assert "needs 'decoder'" in problems_of(replace(chat, model={"architecture": "encoder"}))[0]
    (problem,) = problems_of(config_of())
    assert problem.startswith("data.source = 'python_stdlib' has no preferences")

"""What holds for every objective, and what is said when its data does not fit it."""

import typing
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from transformer.config import OBJECTIVE_DATA, Config, data_kind, problems_of, replace, type_of
from transformer.config.examples import ARCHITECTURES
from transformer.models.transformer import Outputs
from transformer.objectives import OBJECTIVES, objective_of

Pair = tuple[jax.Array, jax.Array]
PAIRS = {"source_path": ("a",), "target_path": ("b",)}
SEQ2SEQ = {"objective": {"name": "seq2seq"}, "model": {"architecture": "encoder_decoder"}}
LABELS = {"objective": {"name": "sequence_classification"}, "data": {"path": ("a.jsonl",)}}


def test_the_configuration_and_the_table_name_the_same_objectives() -> None:
    assert set(OBJECTIVES) == set(typing.get_args(type_of("objective.name"))) == set(ARCHITECTURES)
    kinds = {name: data_kind(replace(Config(), objective={"name": name})) for name in OBJECTIVES}
    assert {name for name, kind in kinds.items() if kind != "text"} == set(OBJECTIVE_DATA)
    for name in OBJECTIVES:
        found = objective_of(replace(Config(), objective={"name": name}))
        assert type(found).__module__ == f"transformer.objectives.{name}"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_model_s_own_terms_reach_every_objective(name: str) -> None:
    def pair(value: float) -> Pair:
        return jnp.float32(value), jnp.float32(4)

    def future(following: jax.Array) -> Any:
        return [jnp.ones((2, 3, 5))], {"losses": {"future_own": pair(3)}, "statistics": {"future_load": pair(5)}}

    outputs = Outputs(jnp.ones((2, 3, 5)), lambda x: x, {"own": pair(1)}, {"load": pair(2)}, future)
    places = ("targets", "positions", "may_answer", "answer_starts", "answer_ends")
    batch = {name: jnp.zeros((2, 3), int) for name in places} | {"weights": jnp.ones((2, 3))}
    batch |= {"segment_ids": jnp.ones((2, 3), int), "reference": jnp.zeros((2, 3))}
    config = replace(Config(), objective={"name": name})
    terms = objective_of(config).terms(config.objective, outputs, batch)
    of_heads = {"future_own"} if name == "multi_token" else set()
    assert set(terms.auxiliary) == {"own"} | of_heads and not set(terms.auxiliary) & set(terms.losses)
    assert sorted(float(value) for value, _ in terms.auxiliary.values()) == ([1, 3] if of_heads else [1])
    assert "load" in terms.statistics and ("future_load" in terms.statistics) == bool(of_heads)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SEQ2SEQ | {"data": PAIRS},
        SEQ2SEQ | {"data": PAIRS | {"path": ("a.jsonl",)}},
        SEQ2SEQ | {"data": {"path": ("a.jsonl",)}},
        SEQ2SEQ | {"data": {"source": ("tfds:wmt14_translate/de-en",)}},
        SEQ2SEQ | {"data": PAIRS | {"source": (), "weights": (2.0,)}},
        LABELS,
        LABELS | {"model": {"architecture": "encoder", "num_labels": 3}},
    ],
)
def test_what_fits_is_no_problem(changes: dict[str, Any]) -> None:
    assert problems_of(replace(Config(), **changes)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            SEQ2SEQ | {"data": {"source_path": ("a",)}},
            "data.source_path is given without data.target_path: every text to read needs one to write",
        ),
        (
            SEQ2SEQ | {"data": PAIRS | {"validation_target_path": ("a",)}},
            "data.validation_target_path is given without data.validation_source_path: every text to read needs one to "
            "write",
        ),
        (
            SEQ2SEQ
            | {"data": {"source": ("hf:a",), "validation_source_path": ("a",), "validation_target_path": ("b",)}},
            "data.validation_source_path holds out pairs of data.source_path, which is not given: use "
            "data.validation_documents",
        ),
        (
            {"data": PAIRS},
            "data.source_path = ('a',): only 'seq2seq' learns from pairs, not objective.name = 'causal'",
        ),
        (
            SEQ2SEQ | {"data": PAIRS | {"validation_tail": 0.1}},
            "data.validation_tail = 0.1: objective.name = 'seq2seq' holds out whole examples (data.validation_documents)",
        ),
        (
            SEQ2SEQ,
            "data.source = 'python_stdlib' has no pairs, which objective.name = 'seq2seq' needs: give data.source_path "
            "and data.target_path, or records with data.source_field and data.target_field by data.path, tfds:NAME or "
            "hf:NAME",
        ),
        (
            {"objective": {"name": "token_classification"}},
            "data.source = 'python_stdlib' has no texts with labels, which objective.name = 'token_classification' "
            "needs: give records with data.text_field and data.label_field by data.path, tfds:NAME or hf:NAME",
        ),
        (
            {"objective": {"name": "seq2seq"}, "data": PAIRS},
            "model.architecture = 'decoder': objective.name = 'seq2seq' needs 'encoder_decoder'",
        ),
        (
            LABELS | {"model": {"architecture": "encoder_decoder"}},
            "model.architecture = 'encoder_decoder': objective.name = 'sequence_classification' needs 'encoder' or 'decoder'",
        ),
        (
            {"model": {"num_labels": 2}},
            "model.num_labels = 2: only 'sequence_classification' and 'token_classification' have labels, not "
            "objective.name = 'causal'",
        ),
        (
            {
                "objective": {"name": "seq2seq"},
                "data": PAIRS | {"source_length": 300},
                "model": {"architecture": "encoder_decoder", "positions": "learned", "num_positions": 256},
            },
            "data.source_length = 300 is longer than model.num_positions = 256",
        ),
    ],
)
def test_what_does_not_fit_is_told(changes: dict[str, Any], problem: str) -> None:
    assert problems_of(replace(Config(), **changes)) == [problem]

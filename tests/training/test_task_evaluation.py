"""Scores of a task are those of the whole validation split, over any number of devices."""

import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer import cli
from transformer.checkpointing.run import resolve
from transformer.config import Config, replace
from transformer.data.prepare import prepare
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer, apply
from transformer.objectives import objective_of, with_examples
from transformer.objectives.scores import classification_scores
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.evaluation import Evaluator
from transformer.training.metrics import read_metrics


def test_scores_are_those_of_all_predictions(tmp_path: Path) -> None:
    records = [{"text": "ab" * (number % 5) + str(number), "label": "xyz"[number % 3]} for number in range(60)]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    data = {"path": (str(tmp_path / "records.jsonl"),), "cache_dir": str(tmp_path / "cache"), "tokenizer": "bytes"}
    config = replace(
        Config(),
        data=data | {"sequence_length": 16, "validation_documents": 0.5, "num_workers": 1},
        model={"num_layers": 1, "width": 16, "num_heads": 2, "scan_layers": False, "initial_scale": 0.5},
        objective={"name": "sequence_classification"},
        train={"batch_size": 4},
    )
    prepared = prepare(config, False)
    config = resolve(config, prepared.tokenizer.vocab_size, prepared.num_labels)
    prepared = with_examples(prepared, objective_of(config), config)
    model = Transformer(config.model)
    params = init_parameters(model, jax.random.key(0))
    found = []
    for devices in (1, 4):
        mesh = make_mesh(replace(config, parallel={"fsdp": devices}), jax.devices()[:devices])
        with jax.set_mesh(mesh):
            evaluator = Evaluator(config, prepared, model, mesh)
            found.append(evaluator(params))
    assert found[0] == pytest.approx(found[1], rel=1e-5)

    @jax.jit
    def logits_of(batch: dict[str, jax.Array]) -> jax.Array:
        outputs = apply(model, params, batch)
        return outputs.logits(outputs.hidden)

    split, predicted, targets = prepared.sources[0].validation, [], []
    for number in range(split.num_windows):
        window = split.window(number)
        for segment in range(1, int(window["segment_ids"].max()) + 1):
            here = window["segment_ids"] == segment
            names, size = ("inputs", "positions", "segment_ids"), int(here.sum())
            row = {
                name: np.pad(np.minimum(window[name][here], 1 if name == "segment_ids" else 999), (0, 16 - size))
                for name in names
            }
            predicted.append(
                int(np.argmax(logits_of({name: values[None] for name, values in row.items()})[0, size - 1]))
            )
            targets.append(int(window["labels"][here][0]))
    assert 0 < np.mean(np.equal(predicted, targets)) < 1 and found[0]["tokens"] == len(targets) > 20
    assert found[0]["accuracy"] == pytest.approx(np.mean(np.equal(predicted, targets)))
    for name, value in classification_scores(np.array(predicted), np.array(targets), 3).items():
        assert found[0][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    ("task", "num_labels", "told"),
    [("sequence_classification", 2, "nats a text"), ("regression", 1, "squared_error")],
)
def test_what_is_counted_is_named(
    task: str,
    num_labels: int,
    told: str,
    make_run: Callable[..., Config],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A classifier learns from texts; how fast it is tells the tokens that it reads, of which a text has several."""
    records = [
        {"text": f"{word} and more", "label": label} for label, word in enumerate(["good", "bad"]) for _ in "1234"
    ]
    (tmp_path / "labelled.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = make_run(
        data={
            "path": (str(tmp_path / "labelled.jsonl"),),
            "validation_path": (str(tmp_path / "labelled.jsonl"),),
            "validation_documents": 0,
            "label_field": "label",
        },
        model={"architecture": "encoder", "num_labels": num_labels},
        objective={"name": task},
        train={"num_steps": 1, "batch_size": 8},
    )
    assert loop.run(config, tmp_path / "run") == 0
    train, validation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert validation["tokens"] == 8 < train["tokens"]
    capsys.readouterr()
    assert cli.run(["evaluate", "--workdir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "(8 texts)" in shown and told in shown

"""Sequence to sequence, from files of pairs to a model that has learned to copy."""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from transformer.checkpointing.run import for_platform, resolve
from transformer.config import Config, replace
from transformer.data.batches import train_batch
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.data.prepare import prepare
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer, apply
from transformer.objectives import normalize, objective_of, with_examples


@pytest.fixture
def copying(tmp_path: Path) -> Config:
    """Texts of letters, to be written as they are read."""
    generator = np.random.default_rng(0)
    texts = ["".join(generator.choice(list("abcdef"), generator.integers(2, 7))) for _ in range(500)]
    (tmp_path / "texts").write_text("".join(text + "\n" for text in texts))
    path = (str(tmp_path / "texts"),)
    data = {"source_path": path, "target_path": path, "cache_dir": str(tmp_path / "cache"), "num_workers": 1}
    return replace(
        Config(),
        objective={"name": "seq2seq", "label_smoothing": 0.1},
        data=data | {"tokenizer": "characters", "sequence_length": 32},
        model={"architecture": "encoder_decoder", "num_layers": 1, "width": 48, "num_heads": 4, "initial_scale": 0.1},
        train={"batch_size": 16},
    )


def test_what_is_written_may_begin_with_another_token() -> None:
    """In each text of a packed row."""
    row = {"inputs": np.array([1, 7, 8, 1, 9]), "positions": np.array([0, 1, 2, 0, 1])}
    config = replace(Config(), objective={"name": "seq2seq"}, model={"architecture": "encoder_decoder"})
    for token, expected in ((None, row["inputs"]), (0, np.array([0, 7, 8, 0, 9]))):
        changed = replace(config, model={"decoder_start_token": token})
        found = objective_of(changed).example(changed, ByteTokenizer(), row, np.random.default_rng(0))
        assert np.array_equal(found["inputs"], expected)


@pytest.mark.slow
def test_a_copy_is_learned(copying: Config) -> None:
    prepared = prepare(copying, False)
    config = resolve(copying, prepared.tokenizer.vocab_size, prepared.num_labels)
    prepared, objective = with_examples(prepared, objective_of(config), config), objective_of(config)
    model = Transformer(for_platform(config.model, "cpu"))
    params = init_parameters(model, jax.random.key(0))
    optimizer = optax.adam(5e-3)

    def loss_of(params, batch):
        terms = objective.terms(config.objective, apply(model, params, batch), batch)
        return normalize(terms.losses)[0], normalize(terms.measures)[0]

    @jax.jit
    def step(params, state, batch):
        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss, accuracy

    state, accuracies = optimizer.init(params), []
    for number in range(180):
        params, state, _, accuracy = step(params, state, train_batch(config, prepared, number))
        accuracies.append(float(accuracy))
    assert accuracies[0] < 0.4 and np.mean(accuracies[-10:]) > 0.95


def test_the_row_is_the_window_in_the_arrays_of_both_sides(copying: Config) -> None:
    config = replace(copying, data={"source_length": 24})
    prepared = with_examples(prepare(config, False), objective_of(config), config)
    assert prepared.maker is not None
    window = prepared.sources[0].train.window(0)
    row = prepared.maker(window, np.random.default_rng(0))
    assert set(row) == set(prepared.maker.arrays)
    assert all(np.array_equal(row[name], window[name]) for name in row)
    lengths = {name: length for name, (length, _) in prepared.maker.arrays.items()}
    assert {length for name, length in lengths.items() if name.startswith("encoder_")} == {24}
    assert {length for name, length in lengths.items() if not name.startswith("encoder_")} == {32}


def test_pairs_of_a_row_do_not_see_each_other(copying: Config) -> None:
    """What one pair of a packed row costs does not depend on what the others are."""
    prepared = prepare(copying, False)
    config = resolve(copying, prepared.tokenizer.vocab_size)
    prepared, objective = with_examples(prepared, objective_of(config), config), objective_of(config)
    model = Transformer(for_platform(config.model, "cpu"))
    params = init_parameters(model, jax.random.key(0))
    batch = train_batch(config, prepared, 0, [0])
    assert batch["segment_ids"].max() > 2

    @jax.jit
    def cost(batch):
        return objective.terms(config.objective, apply(model, params, batch), batch).losses["cross_entropy"][0]

    first = batch | {"weights": batch["weights"] * (batch["segment_ids"] == 1)}
    changed = dict(first)
    for side in ("encoder_", ""):
        others = first[f"{side}segment_ids"] > 1
        changed[f"{side}inputs"] = np.where(others, 4, first[f"{side}inputs"])
    assert not np.array_equal(changed["encoder_inputs"], first["encoder_inputs"])
    np.testing.assert_allclose(cost(changed), cost(first), rtol=1e-5)
    changed["encoder_inputs"] = np.where(first["encoder_segment_ids"] == 1, 4, first["encoder_inputs"])
    assert abs(cost(changed) - cost(first)) > 1e-3, "the decoder reads what its encoder read"

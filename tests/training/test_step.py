"""The training step: exact gradients however the batch is split, skipped steps, purity, one trace."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer.models.parameters import init_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer, make_schedule
from transformer.training.state import TrainState, initial_state
from transformer.training.step import make_gradient, make_terms, make_train_step


def begin(config) -> tuple[Any, TrainState]:
    """Returns the step, compiled on its first call, and the state before it."""
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    # The default generator takes the compiler seconds.
    params = init_parameters(model, jax.random.key(config.seed, impl="unsafe_rbg"))
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(zero, params, optimizer.init(params), zero)
    return jax.jit(make_train_step(config, model, optimizer)), state


def gradient_of(config, batch) -> tuple[Any, Any, Any]:
    """Returns the compiled gradient, and the gradient and metrics of a batch."""
    model = Transformer(config.model)
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    gradient = jax.jit(make_gradient(config, model))
    batch = jax.tree.map(jnp.asarray, batch)
    return gradient.lower(params, batch, None).compile(), *gradient(params, batch, None)


def distance(actual: Any, expected: Any) -> float:
    """The largest ||a - b|| / ||b|| over the arrays of two trees."""
    ratios = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), actual, expected)
    return max(map(float, jax.tree.leaves(ratios)))


def assert_same_bits(one: Any, other: Any) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# Microbatches.


@pytest.mark.parametrize(
    "scan_layers", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unrolled", "scanned"]
)
def test_microbatches_give_the_gradient_of_the_whole(scan_layers, tiny_config, tiny_batch):
    changes = {"model": {"scan_layers": scan_layers}, "objective": {"z_loss": 1e-2}}
    batch = tiny_batch(tiny_config())
    # Of four parts one has a hundredth of the weight that its tokens had, and one three times as much.
    batch["weights"] *= np.array([0.01, 3, 1, 1] * 2, np.float32)[:, None]
    _, whole, metrics = gradient_of(tiny_config(**changes), batch)
    for parts in (2, 4):
        _, gradient, found = gradient_of(tiny_config(**changes, train={"num_microbatches": parts}), batch)
        assert distance(gradient, whole) < 1e-6
        assert set(found) == set(metrics) == {"loss", "cross_entropy", "z_loss", "tokens"}
        for name, value in metrics.items():
            assert found[name] == pytest.approx(value.item(), rel=1e-6), name


def test_a_microbatch_without_any_weight(tiny_config, tiny_batch):
    batch = tiny_batch(tiny_config())
    batch["weights"][0::2] = 0
    _, whole, _ = gradient_of(tiny_config(), batch)
    _, gradient, metrics = gradient_of(tiny_config(train={"num_microbatches": 2}), batch)
    assert distance(gradient, whole) < 1e-6
    read, learned_from = (np.sum(batch[name] > 0) for name in ("segment_ids", "weights"))
    assert metrics["tokens"] == read > learned_from > 0


def test_a_batch_that_grows_gives_the_gradient_of_its_rows(tiny_config, tiny_batch):
    growing = {"num_microbatches": 4, "batch_warmup_steps": 6, "num_steps": 20}
    descent = {"name": "sgd", "clip_norm": 0.0, "schedule": "constant", "learning_rate": 1.0}
    config = tiny_config(train=growing, optimizer=descent)
    step, state = begin(config)
    traces = step._cache_size()
    whole = jax.jit(make_gradient(tiny_config(), Transformer(config.model)))
    batch = tiny_batch(config)
    for number, parts in ((0, 1), (3, 2), (4, 3), (6, 4), (19, 4)):
        rows = np.arange(8) % 4 < parts
        used = {name: np.where(rows[:, None], values, 0) for name, values in batch.items()}
        expected, wanted = whole(state.params, jax.tree.map(jnp.asarray, used), None)
        at = TrainState(jnp.int32(number), state.params, state.opt_state, state.nonfinite_steps)
        after, metrics = step(at, used)
        assert distance(jax.tree.map(jnp.subtract, state.params, after.params), expected) < 1e-5
        assert metrics["gradient_norm"] == pytest.approx(optax.tree.norm(expected).item(), rel=1e-5)
        assert metrics["loss"] == pytest.approx(wanted["loss"].item(), rel=1e-6)
        assert metrics["tokens"] == np.sum(used["segment_ids"] > 0)
    assert step._cache_size() == traces + 1
    # What is beyond the rows in use is not even looked at.
    state = TrainState(jnp.int32(0), state.params, state.opt_state, state.nonfinite_steps)
    poisoned = {name: np.where(np.arange(8)[:, None] % 4 < 1, values, 7) for name, values in batch.items()}
    poisoned["weights"] = np.where(np.arange(8)[:, None] % 4 < 1, batch["weights"], 0)
    used = {name: np.where(np.arange(8)[:, None] % 4 < 1, values, 0) for name, values in batch.items()}
    assert_same_bits(step(state, poisoned)[0], step(state, used)[0])


def test_microbatches_save_memory_and_cost_no_second_forward_pass(tiny_config, tiny_batch):
    def compiled(parts: int) -> Any:
        config = tiny_config(train={"num_microbatches": parts, "batch_size": 32})
        return gradient_of(config, tiny_batch(config))[0]

    whole, parts = compiled(1), compiled(4)
    # The analysis counts the loop's body once: a quarter of the work, to which a forward pass of the whole would add a third.
    assert 0.25 < parts.cost_analysis()["flops"] / whole.cost_analysis()["flops"] < 0.35
    assert parts.memory_analysis().temp_size_in_bytes < 0.5 * whole.memory_analysis().temp_size_in_bytes


def test_dropout_differs_from_part_to_part_and_from_step_to_step(tiny_config, tiny_batch):
    config = tiny_config(
        model={"dropout": 0.5, "num_layers": 1}, train={"num_microbatches": 2}, optimizer={"learning_rate": 1e-30}
    )
    # Both parts have the same rows, so that with the same masks they would have the same loss.
    rows = jax.tree.map(lambda values: values[4:], tiny_batch(config))
    batch = jax.tree.map(lambda values: jnp.repeat(values, 2, axis=0), rows)
    model = Transformer(config.model)
    key = jax.random.key(7, impl="unsafe_rbg")
    params = init_parameters(model, key)
    terms = jax.jit(make_terms(config, model))
    gradient = jax.jit(make_gradient(config, model))
    found = [terms(params, rows, jax.random.fold_in(key, part)).losses["cross_entropy"] for part in range(2)]
    means = [(value / weight).item() for value, weight in found]
    assert means[0] != pytest.approx(means[1], rel=1e-4)
    assert gradient(params, batch, key)[1]["cross_entropy"] == pytest.approx(np.mean(means), rel=1e-5)

    step, state = begin(config)
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert first["loss"] != pytest.approx(second["loss"].item(), rel=1e-4)


# The step.


def test_the_step_is_the_gradient_then_the_optimizer_then_the_rate(tiny_config, tiny_batch):
    config = tiny_config(optimizer={"warmup_steps": 3, "learning_rate": 0.01})
    batch = tiny_batch(config)
    step, state = begin(config)
    optimizer = make_optimizer(config, parameter_specs(Transformer(config.model)))
    _, gradient, _ = gradient_of(config, batch)
    updates, _ = optimizer.update(gradient, state.opt_state, state.params, rate=0.01 / 3)
    after, metrics = step(state, batch)
    expected = optax.apply_updates(state.params, updates)
    assert distance(after.params, expected) < 1e-5
    norm = np.sqrt(sum(np.sum(np.square(leaf, dtype=np.float64)) for leaf in jax.tree.leaves(gradient)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert (after.step, after.nonfinite_steps) == (1, 0)


def test_metrics_of_a_run(tiny_config, tiny_batch):
    config = tiny_config(train={"num_steps": 6}, optimizer={"warmup_steps": 2, "learning_rate": 0.01})
    step, state = begin(config)
    schedule = make_schedule(config)
    traces = step._cache_size()
    rates, losses = [], []
    for number in range(6):
        batch = tiny_batch(config, 0)
        state, metrics = step(state, batch)
        assert set(metrics) == {
            "loss", "cross_entropy", "tokens", "gradient_norm", "learning_rate", "nonfinite_steps",
        }  # fmt: skip
        assert metrics["tokens"] == np.sum(batch["segment_ids"] > 0)
        assert metrics["loss"] == metrics["cross_entropy"]
        assert state.step == number + 1
        rates.append(metrics["learning_rate"].item())
        losses.append(metrics["loss"].item())
    assert rates == pytest.approx([np.asarray(schedule(count)).item() for count in range(6)])
    assert rates[0] == pytest.approx(0.005) and max(rates) == pytest.approx(0.01) and rates[-1] == pytest.approx(0.001)
    assert losses[-1] < 0.9 * losses[0], "it learns the batch"
    assert step._cache_size() == traces + 1


def test_the_step_is_traced_once_and_pure(tiny_config, tiny_batch):
    config = tiny_config(train={"num_microbatches": 2})
    step, state = begin(config)
    traces = 0

    def counted(state, batch):
        nonlocal traces
        traces += 1
        return step.__wrapped__(state, batch)

    jitted = jax.jit(counted)
    first = jitted(state, tiny_batch(config, 0))
    again = jitted(state, tiny_batch(config, 0))
    assert_same_bits(first, again)
    later, _ = jitted(first[0], tiny_batch(config, 1))
    jitted(later, tiny_batch(config, 2))
    assert traces == 1
    types = [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(state)]
    assert [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(later)] == types


def test_steps_without_a_finite_gradient_change_nothing_but_counters(tiny_config, tiny_batch):
    config = tiny_config()
    step, state = begin(config)
    good = tiny_batch(config)
    bad = good | {"weights": np.where(good["weights"] > 0, np.float32(np.nan), 0)}
    state, _ = step(state, good)
    kept = state
    for count in (1, 2):
        state, metrics = step(state, bad)
        assert not np.isfinite(metrics["gradient_norm"])
        assert metrics["nonfinite_steps"] == state.nonfinite_steps == count
        assert state.step == 1 + count
        assert_same_bits((state.params, state.opt_state), (kept.params, kept.opt_state))
    state, metrics = step(state, good)
    assert metrics["nonfinite_steps"] == state.nonfinite_steps == 0
    assert state.step == 4
    assert optax.tree_utils.tree_get(state.opt_state, "count") == 2
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, kept.params)
    assert all(jax.tree.leaves(moved))


def test_an_infinite_parameter_gradient_alone_is_caught(tiny_config, tiny_batch):
    config = tiny_config(optimizer={"clip_norm": 0.0})
    step, state = begin(config)
    huge = state.params | {"embedding": state.params["embedding"].at[5, 0].set(jnp.inf)}
    state = TrainState(state.step, huge, state.opt_state, state.nonfinite_steps)
    after, metrics = step(state, tiny_batch(config))
    assert metrics["nonfinite_steps"] == 1
    assert_same_bits(after.opt_state, state.opt_state)


def test_a_batch_without_targets_is_a_finite_step(tiny_config, tiny_batch):
    config = tiny_config(train={"num_microbatches": 2}, optimizer={"weight_decay": 0.0})
    step, state = begin(config)
    batch = tiny_batch(config)
    after, metrics = step(state, batch | {"weights": np.zeros_like(batch["weights"])})
    assert metrics["loss"] == metrics["gradient_norm"] == metrics["nonfinite_steps"] == 0 < metrics["tokens"]
    assert_same_bits(after.params, state.params)


def test_padding_rows_never_receive_weight(tiny_config, tiny_batch):
    config = tiny_config(
        model={"tied_embeddings": False}, objective={"z_loss": 1e-2}, optimizer={"learning_rate": 0.1, "epsilon": 1e-30}
    )
    step, state = begin(config)
    for seed in range(3):
        state, _ = step(state, tiny_batch(config, seed))
    for name in ("embedding", "head"):
        assert np.all(state.params[name][203:] == 0)
        for moment in ("mu", "nu"):
            assert np.all(optax.tree_utils.tree_get(state.opt_state, moment)[name][203:] == 0)


def test_initial_state_is_a_function_of_the_seed(tiny_config):
    config = tiny_config(model={"num_layers": 1})
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    one, again, other = (initial_state(model, optimizer, seed) for seed in (3, 3, 4))
    assert_same_bits(one, again)
    assert np.all(one.params["embedding"][:203] != other.params["embedding"][:203])
    assert one.step == one.nonfinite_steps == 0
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(one.opt_state))

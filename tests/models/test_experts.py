"""Mixtures of experts against loops over tokens and experts in double precision; what they may and may not depend on."""

import contextlib
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer.config import ConfigError, ModelConfig, validate
from transformer.models import grouped
from transformer.models.experts import Experts
from transformer.models.masks import Tokens
from transformer.models.mixers import Context
from transformer.models.parameters import abstract_parameters, bind, init_parameters, parameter_specs
from transformer.models.transformer import Transformer, apply
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training.state import TrainState, state_shardings
from transformer.training.step import make_terms, make_train_step

BASE = ModelConfig(
    vocab_size=203,
    num_layers=2,
    width=4,
    num_heads=2,
    num_experts=4,
    expert_width=3,
    layers="attention/experts",
    initial_scale=0.8,
    depth_scaled_init=False,
    scan_layers=False,
)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [0, 3, 3, 3, 3, 3]], np.int32)


def context_of(segments, index=None, causal=True) -> Context:
    tokens = Tokens(jnp.zeros(segments.shape, jnp.int32), jnp.asarray(segments))
    return Context(tokens, tokens, index, causal=causal)


def make(config, seed=0, length=6, rows=2) -> tuple[Experts, Any, Any]:
    """Returns module, parameters and input."""
    module, rng = Experts(config, config.num_layers), np.random.default_rng(seed)

    def draw(like: Any, scale: float) -> Any:
        return jnp.asarray(scale * rng.standard_normal(like.shape), jnp.float32)

    params = jax.tree.map(lambda like: draw(like, 0.6), abstract_parameters(module))
    return module, params, draw(np.zeros((rows, length, config.width)), 1.0)


def run(config, module, params, x, segments=SEGMENTS, index=None) -> tuple[Any, Any]:
    causal = config.routing == "token_choice"
    forward = jax.jit(lambda p, x: bind(module, p)(x, context_of(segments, index, causal)))
    return forward(params, x)


def activation(config, x):
    if config.activation in ("gelu", "geglu"):
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x / (1 + np.exp(-x))


def scores_of(config, params, x):
    logits = x @ params["router"]["kernel"]
    if config.router_score == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    scores = np.exp(logits - logits.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def expert(config, params, x, number):
    """What one expert makes of one token; `number` None: the shared ones."""
    if number is None:
        parts = {name: part["kernel"] for name, part in params["shared"].items()}
    else:
        parts = {name: value[number] for name, value in params.items() if name not in ("router", "shared")}
    up = x @ parts["up"]
    hidden = up * activation(config, x @ parts["gate"]) if "gate" in parts else activation(config, up)
    return hidden @ parts["down"]


def chosen_by(config, params, scores):
    """Returns the experts of a token with these scores, best first, and their weights."""
    preferred = scores + params["router"].get("bias", 0)
    groups = np.split(np.arange(config.num_experts), config.num_expert_groups)
    best = sorted(groups, key=lambda group: -sum(sorted(preferred[group])[-2:]))[: config.groups_per_token]
    experts = sorted(np.concatenate(best), key=lambda e: -preferred[e])[: config.experts_per_token]
    is_normalized = config.experts_per_token > 1 and config.normalize_expert_weights
    total = scores[experts].sum() if is_normalized else 1.0
    return experts, config.expert_scale * scores[experts] / total


def reference(config, params, x, segments=SEGMENTS, limited=True):
    """The output, and the number of choices that were dropped, token by token."""
    output, dropped = np.zeros_like(x), 0
    factor = config.expert_capacity_factor if limited else None
    room = math.inf
    if factor is not None:
        room = math.ceil(factor * config.experts_per_token * x.shape[1] / config.num_experts)
    for row in range(len(x)):
        load = [0] * config.num_experts
        for t in range(x.shape[1]):
            if config.num_shared_experts:
                output[row, t] += expert(config, params, x[row, t], None)
            if segments[row, t] == 0:
                continue
            for e, weight in zip(*chosen_by(config, params, scores_of(config, params, x[row, t])), strict=True):
                load[e] += 1
                if load[e] > room:
                    dropped += 1
                else:
                    output[row, t] += weight * expert(config, params, x[row, t], e)
    return output, dropped


def in_double(params):
    return jax.tree.map(lambda x: np.array(x, np.float64), params)


def numerical_gradient(function, tree, step=1e-5):
    """Central differences of every number of a tree of float64 arrays."""

    def of_array(array):
        gradient = np.zeros_like(array)
        for place in np.ndindex(array.shape):
            middle = array[place]
            values = []
            for array[place] in (middle + step, middle - step):
                values.append(function())
            array[place] = middle
            gradient[place] = (values[0] - values[1]) / (2 * step)
        return gradient

    return jax.tree.map(of_array, tree)


CASES = {
    "softmax": {},
    "one expert": {"experts_per_token": 1, "activation": "geglu"},
    "sigmoid": {
        "router_score": "sigmoid",
        "activation": "swiglu",
        "balance_bias_rate": 0.1,
        "num_shared_experts": 2,
        "experts_per_token": 3,
    },
    "capacity": {"expert_capacity_factor": 0.5, "activation": "swiglu"},
    "groups": {
        "num_experts": 6,
        "num_expert_groups": 3,
        "groups_per_token": 2,
        "experts_per_token": 3,
        "router_score": "sigmoid",
        "balance_bias_rate": 0.1,
        "num_shared_experts": 1,
        "normalize_expert_weights": False,
        "expert_scale": 2.5,
    },
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_a_loop_over_experts(changes, monkeypatch):
    monkeypatch.setattr(grouped, "BLOCK", 4)
    config = dataclasses.replace(BASE, num_layers=1, balance_loss=0.0, **changes)
    module, params, x = make(config)
    ahead = np.cos(np.arange(x.size)).reshape(x.shape)

    def total(params, x):
        y, auxiliary = bind(module, params)(x, context_of(SEGMENTS))
        return jnp.sum(y * ahead), (y, auxiliary)

    differentiated = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (_, (actual, auxiliary)), gradients = differentiated(params, x)
    double, inputs = in_double((params, x))
    expected, dropped = reference(config, double, inputs)
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    choices = config.experts_per_token * np.sum(SEGMENTS != 0)
    if config.expert_capacity_factor is None:
        assert dropped == 0 and "expert_dropped" not in auxiliary["statistics"]
    else:
        assert tuple(map(float, auxiliary["statistics"]["expert_dropped"])) == (dropped, choices)
        assert dropped > 0
    slopes = numerical_gradient(lambda: np.sum(reference(config, double, inputs)[0] * ahead), (double, inputs))
    if "bias" in params["router"]:
        assert np.all(gradients[0]["router"].pop("bias") == 0) and np.all(slopes[0]["router"].pop("bias") == 0)
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(slopes), strict=True
    ):
        assert np.linalg.norm(expected) > 0, path
        assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected), path


def test_padding_is_routed_nowhere():
    """It takes no capacity and counts in no loss and no statistic, wherever it stands and whatever it holds."""
    config = dataclasses.replace(BASE, expert_capacity_factor=0.5, router_z_loss=0.1, balance_bias_rate=0.1)
    module, params, x = make(config)
    other = jnp.where((SEGMENTS == 0)[:, :, None], 7 * x + 1, x)
    (y, auxiliary), (z, same) = (run(config, module, params, inputs) for inputs in (x, other))
    np.testing.assert_array_equal(y, z)
    assert np.all(np.asarray(y)[SEGMENTS == 0] == 0)
    jax.tree.map(np.testing.assert_array_equal, auxiliary, same)
    _, nothing = run(config, module, params, x, 0 * SEGMENTS)
    assert all(float(part) == 0 for part in jax.tree.leaves(nothing))


def test_losses_and_statistics_by_hand():
    config = dataclasses.replace(BASE, balance_loss=0.5, router_z_loss=0.1, balance_bias_rate=0.1)
    module, params, x = make(config)
    _, auxiliary = run(config, module, params, x)
    double, inputs = in_double((params, x))
    balance, squares, entropy, loads, largest = 0.0, 0.0, 0.0, np.zeros(4), 0.0
    for row in range(2):
        real = inputs[row][SEGMENTS[row] != 0]
        shares = np.stack([scores_of(config, double, token) for token in real])
        load = np.bincount(np.ravel([chosen_by(config, double, p)[0] for p in shares]), minlength=4)
        balance += 4 * np.sum(load / load.sum() * shares.mean(0))
        squares += np.sum(np.log(np.sum(np.exp(real @ double["router"]["kernel"]), axis=-1)) ** 2)
        entropy -= sum(f * math.log(f) for f in load / load.sum() if f)
        largest += load.max() * 4 / load.sum()
        loads += load
    expected = {
        "losses": {"balance_loss": (0.5 * balance, 2), "router_z_loss": (0.1 * squares, 10), "balance_bias": (0, 20)},
        "statistics": {"load_entropy": (entropy, 2), "expert_max_load": (largest, 2)},
    }
    assert jax.tree.structure(expected) == jax.tree.structure(auxiliary)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), auxiliary, expected)

    def injected(bias):
        given = {**params, "router": {**params["router"], "bias": bias}}
        return bind(module, given)(x, context_of(SEGMENTS))[1]["losses"]["balance_bias"][0]

    gradient = jax.jit(jax.grad(injected))(params["router"]["bias"])
    np.testing.assert_allclose(gradient, loads - loads.mean(), rtol=1e-6)
    assert np.any(np.asarray(gradient) != 0)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_experts_choose_their_share_of_each_row(score):
    """As many tokens as 0.8 * 2 / 4 of those of the row, rounded up: 2 of 5 and 2 of 3."""
    config = dataclasses.replace(BASE, architecture="encoder", routing="expert_choice", router_score=score)
    config = dataclasses.replace(config, expert_capacity_factor=0.8)
    module, params, x = make(config)
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 1, 0, 1, 1, 0]], np.int32)
    actual, auxiliary = run(config, module, params, x, segments)
    double, inputs = in_double((params, x))
    expected, missing = np.zeros_like(inputs), 0
    for row in range(2):
        real = np.flatnonzero(segments[row])
        scores = scores_of(config, double, inputs[row])
        taken = [sorted(real, key=lambda t, e=e: -scores[t, e])[: math.ceil(0.4 * len(real))] for e in range(4)]
        missing += len(set(real) - {t for tokens in taken for t in tokens})
        for e, tokens in enumerate(taken):
            for t in tokens:
                expected[row, t] += scores[t, e] * expert(config, double, inputs[row, t], e)
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    assert tuple(map(float, auxiliary["statistics"]["expert_dropped"])) == (missing, 8)
    assert "balance_loss" not in auxiliary["losses"]


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_no_token_depends_on_later_ones(capacity):
    config = dataclasses.replace(BASE, expert_capacity_factor=capacity, experts_per_token=2)
    module, params, x = make(config, length=12)
    segments = np.ones((2, 12), np.int32)

    @jax.jit
    def differentiated(x):
        y, backward = jax.vjp(lambda x: bind(module, params)(x, context_of(segments))[0], x)
        return y, backward(jnp.zeros_like(y).at[:, 5].set(1.0))[0]

    y, gradient = differentiated(x)
    assert np.all(np.asarray(gradient)[:, 6:] == 0) and np.any(np.asarray(gradient)[:, :6] != 0)
    # Gradients do not see choices: other tokens afterwards change nothing before.
    for seed in range(3):
        later = jnp.asarray(np.random.default_rng(seed).standard_normal((2, 6, config.width)), jnp.float32)
        changed, _ = differentiated(jnp.concatenate([x[:, :6], later], axis=1))
        np.testing.assert_array_equal(changed[:, :6], y[:, :6])
    if capacity is not None:
        assert float(run(config, module, params, x, segments)[1]["statistics"]["expert_dropped"][0]) > 0


def test_packing_changes_nothing_when_dropless(tiny_config):
    config = tiny_config(
        model={"layers": "attention/experts", "expert_width": 16, "num_experts": 4, "num_layers": 1}
    ).model
    model = Transformer(config)
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    lengths, tokens = [5, 7, 3], np.random.default_rng(0).integers(4, 203, 16).astype(np.int32)
    packed = {name: np.zeros((3, 16), np.int32) for name in ("inputs", "positions", "segment_ids")}
    alone = {name: np.zeros((3, 16), np.int32) for name in packed}
    start = 0
    for row, length in enumerate(lengths):
        document = {"inputs": tokens[start : start + length], "positions": np.arange(length), "segment_ids": row + 1}
        for name, values in document.items():
            packed[name][0, start : start + length] = alone[name][row, :length] = values
        start += length
    hidden = jax.jit(lambda batch: apply(model, params, batch).hidden)
    together, apart = (np.asarray(hidden(batch)) for batch in (packed, alone))
    start = 0
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(together[0, start : start + length], apart[row, :length], rtol=1e-5, atol=1e-6)
        start += length


EXPERTS = {"layers": "attention/experts", "num_experts": 4, "expert_width": 16, "router_z_loss": 1e-2}
EXPERTS |= {"balance_bias_rate": 0.5, "balance_loss": 0.1}


def begin(config, mesh=None) -> tuple[Any, Any, TrainState]:
    """Returns model, compiled training step and first state, laid out over a mesh if there is one."""
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    state = TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))
    layout = None if mesh is None else state_shardings(model, optimizer, mesh)
    state = state if mesh is None else jax.device_put(state, layout)
    return model, jax.jit(make_train_step(config, model, optimizer, layout)), state


def distance(actual: Any, expected: Any) -> float:
    """The largest ||a - b|| / ||b|| over the arrays of two trees."""
    ratios = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-9), actual, expected)
    return max(map(float, jax.tree.leaves(ratios)))


PLAIN = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "warmup_steps": 0, "clip_norm": 0.0}
"""An optimizer whose steps are the gradient."""


@pytest.mark.parametrize(
    "capacity", [pytest.param(None, id="dropless", marks=pytest.mark.slow), pytest.param(0.8, id="capacity")]
)
def test_microbatches_layers_in_a_loop_and_a_mesh_change_no_step(capacity, tiny_config, tiny_batch):
    """Rows have different numbers of tokens, one has none, and documents are packed. Only without a capacity do layers
    and mesh differ, as well as microbatches: the rest takes the same way."""
    batch = tiny_batch(tiny_config())
    batch["segment_ids"][5] = 0
    batch["weights"][5] = 0
    model = EXPERTS | {"expert_capacity_factor": capacity, "num_shared_experts": 1}
    looped = model | {"scan_layers": True}
    runs = {"whole": {"model": model}, "parts": {"model": looped, "train": {"num_microbatches": 4}}}
    if capacity is None:
        runs["parts"]["parallel"] = {"fsdp": 2, "tensor": 4}
    else:
        runs["whole"]["model"] = looped
    found = {}
    for name, changes in runs.items():
        config = tiny_config(optimizer=PLAIN, **changes)
        mesh = make_mesh(config) if "parallel" in changes else None
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            _, step, state = begin(config, mesh)
            after, metrics = step(state, batch)
        update = jax.tree.map(lambda new, old: np.asarray(new) - np.asarray(old), after.params, state.params)
        found[name] = (update, jax.device_get(metrics))
    update, metrics = found["whole"]
    names = {"loss", "cross_entropy", "balance_loss", "router_z_loss", "balance_bias", "tokens", "gradient_norm"}
    names |= {"expert_max_load", "load_entropy", "learning_rate", "nonfinite_steps"}
    assert set(metrics) == names | (set() if capacity is None else {"expert_dropped"})
    assert metrics["balance_loss"] > 0.1 and metrics["expert_max_load"] > 1 and metrics.get("expert_dropped", 1) > 0
    total = metrics["cross_entropy"] + metrics["balance_loss"] + metrics["router_z_loss"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-6)
    bias = update["decoder"]["layers"]["feedforward"]["router"]["bias"]
    assert np.all(np.any(bias != 0, axis=1)) and set(np.abs(bias).ravel()) <= {np.float32(0.5), np.float32(0)}
    assert distance(found["parts"][0], update) < 5e-6
    assert set(found["parts"][1]) == set(metrics)
    for key, value in metrics.items():
        assert found["parts"][1][key] == pytest.approx(float(value), rel=5e-6, abs=1e-6), key


@pytest.mark.slow
def test_biases_even_out_the_load(tiny_config):
    """Under Adam, a router that sends all tokens to one expert. By itself it would still do so at the end."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, 203, (4, 129), dtype=np.int32)
    batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": np.ones((4, 128), np.float32)}
    batch |= {"positions": np.tile(np.arange(128, dtype=np.int32), (4, 1)), "segment_ids": np.ones((4, 128), np.int32)}
    model = EXPERTS | {"balance_bias_rate": 0.015, "balance_loss": 0.0, "experts_per_token": 1, "initial_scale": 0.3}
    model |= {"num_layers": 1, "width": 16}
    optimizer = {"learning_rate": 3e-3, "schedule": "constant", "warmup_steps": 0}
    _, step, state = begin(tiny_config(model=model, optimizer=optimizer, data={"sequence_length": 128}))
    # What all tokens have in common makes them alike to the router.
    common = 0.5 * jax.random.normal(jax.random.key(1, impl="unsafe_rbg"), (16,))
    state.params["embedding"] = state.params["embedding"] + common
    loads = []
    for _ in range(40):
        state, metrics = step(state, batch)
        loads.append(float(metrics["expert_max_load"]))
    assert loads[0] > 3.5 and loads[-1] < 1.7
    # It is the biases' doing: without them, nearly all tokens would go to one expert.
    params = jax.tree.map(np.asarray, state.params)
    params["decoder"]["layers"]["feedforward"]["router"]["bias"] = np.zeros((1, 4), np.float32)
    _, metrics = step(dataclasses.replace(state, params=params), batch)
    assert metrics["expert_max_load"] > 2.5


def test_behind_a_cache_nothing_is_dropped():
    """Otherwise it would matter how many tokens come at a time."""
    config = dataclasses.replace(BASE, expert_capacity_factor=0.5)
    module, params, x = make(config)
    actual, auxiliary = run(config, module, params, x, index=jnp.int32(0))
    expected, _ = reference(config, *in_double((params, x)), limited=False)
    assert np.linalg.norm(actual - expected) <= 1e-5 * np.linalg.norm(expected)
    assert "expert_dropped" not in auxiliary["statistics"]


def test_every_stack_gives_its_terms(tiny_config):
    """An encoder's and those of the blocks that predict further tokens are told from the decoder's by their names."""
    own = {"balance_loss", "router_z_loss", "balance_bias"}
    further = {"objective": {"name": "multi_token"}, "model": EXPERTS | {"num_future_tokens": 2}}
    reading = {"objective": {"name": "seq2seq"}, "model": EXPERTS | {"architecture": "encoder_decoder"}}
    for changes, part in ((further, "future"), (reading, "encoder")):
        config = tiny_config(**changes)
        model = Transformer(config.model)
        names = ("inputs", "targets", "positions", "segment_ids", "weights")
        names += tuple(f"encoder_{name}" for name in ("inputs", "positions", "segment_ids"))
        batch = {name: jax.ShapeDtypeStruct((8, 16), "float32" if name == "weights" else "int32") for name in names}
        terms_of = make_terms(config, model)

        def found(params, batch, terms_of=terms_of):
            terms = terms_of(params, batch)
            return terms.auxiliary, terms.statistics

        auxiliary, statistics = jax.eval_shape(found, abstract_parameters(model), batch)
        assert set(auxiliary) == own | {f"{part}_{name}" for name in own}
        loads = {"expert_max_load", "load_entropy"}
        assert set(statistics) == loads | {f"{part}_{name}" for name in loads}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts_per_token": 5}, r"experts_per_token = 5: .*model.num_experts = 4"),
        ({"routing": "expert_choice"}, r"'expert_choice' with model.layers = .*later ones, which a decoder must not"),
        (
            {"routing": "expert_choice", "architecture": "encoder", "balance_bias_rate": 0.1},
            r"balance_bias_rate = 0.1: .*evenly",
        ),
        ({"num_expert_groups": 3}, r"num_expert_groups = 3 does not divide model.num_experts = 4"),
        ({"num_expert_groups": 4}, r"num_expert_groups = 4: model.num_experts = 4 makes groups of one"),
        ({"groups_per_token": 2}, r"groups_per_token = 2: there are model.num_expert_groups = 1"),
        (
            {"num_expert_groups": 2, "experts_per_token": 3},
            r"experts_per_token = 3: model.groups_per_token = 1 with model.num_expert_groups = 2 leaves a token 2",
        ),
        (
            {"routing": "expert_choice", "architecture": "encoder", "num_expert_groups": 2},
            r"num_expert_groups = 2: it is tokens that choose groups",
        ),
        ({"expert_capacity_factor": 0.0}, r"expert_capacity_factor = 0.0: must be greater than 0"),
        ({"feedforward_width": 0}, r"feedforward_width = 0"),
    ],
)
def test_what_cannot_be_is_said(changes, message, tiny_config):
    model = {"layers": "attention/experts", "num_experts": 4}
    objective = {"name": "masked_lm"} if "architecture" in changes else {}
    with pytest.raises(ConfigError, match=message):
        validate(tiny_config(model=model | changes, objective=objective))


def test_experts_may_choose_where_nothing_is_predicted(tiny_config):
    reading = {"architecture": "encoder_decoder", "layers": "attention", "encoder_layers": "attention/experts"}
    validate(tiny_config(model=reading | {"routing": "expert_choice"}, objective={"name": "span_corruption"}))
    # Keys of experts are no mistake where no layer has any.
    validate(tiny_config(model={"num_experts": 4, "experts_per_token": 5, "routing": "expert_choice"}))

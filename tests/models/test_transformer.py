"""The whole model: against a reference in double precision, and by properties that hold exactly."""

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from transformer.config import LayerKind, ModelConfig
from transformer.models import blocks, causal_blocks, transformer
from transformer.models.parameters import init_parameters
from transformer.models.transformer import MASKED_LOGIT, Transformer, apply
from transformer.objectives.cross_entropy import softmax_cross_entropy


@pytest.fixture
def model_config(tiny_config) -> ModelConfig:
    return tiny_config(model={"attention_implementation": "reference"}).model


@pytest.fixture
def batch(tiny_config, tiny_batch) -> dict[str, np.ndarray]:
    return tiny_batch(tiny_config())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in rows of 16 tokens, the last of them short."""
    monkeypatch.setattr(causal_blocks, "SMALLEST", 5)
    monkeypatch.setattr(causal_blocks, "MOST", 99)


def rapid_key(seed: int) -> jax.Array:
    """A key whose bits come from one operation; the default generator takes the compiler seconds."""
    return jax.random.key(seed, impl="unsafe_rbg")


def build(config: ModelConfig, **changes: Any) -> tuple[Transformer, Any]:
    model = Transformer(dataclasses.replace(config, **changes))
    return model, perturbed(init_parameters(model, rapid_key(0)))


def perturbed(params: Any) -> Any:
    """Moves biases and scales from 0 and 1, where a missing one would not be seen."""
    return jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)


def traced_logits(model: Transformer, params: Any, batch: Mapping[str, Any], key: Any = None) -> jax.Array:
    outputs = apply(model, params, jax.tree.map(jnp.asarray, batch), key)
    return outputs.logits(outputs.hidden)


@partial(jax.jit, static_argnums=0)
def logits_of(model: Transformer, params: Any, batch: Mapping[str, Any], key: Any = None) -> jax.Array:
    return traced_logits(model, params, batch, key)


@partial(jax.jit, static_argnums=0)
def token_losses(model: Transformer, params: Any, batch: Mapping[str, Any]) -> jax.Array:
    return softmax_cross_entropy(traced_logits(model, params, batch), batch["targets"])[0]


def mean_loss(model: Transformer, params: Any, batch: Mapping[str, Any], key: Any = None) -> jax.Array:
    losses = softmax_cross_entropy(traced_logits(model, params, batch, key), batch["targets"])[0]
    return jnp.sum(losses * batch["weights"]) / jnp.sum(batch["weights"])


differentiated = jax.jit(jax.value_and_grad(mean_loss, argnums=1), static_argnums=0)


def distance(actual: Any, expected: Any) -> float:
    """The largest ||a - b|| / ||b|| over the arrays of two trees."""
    ratios = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30), actual, expected)
    return max(map(float, jax.tree.leaves(ratios)))


# A second implementation, for one row at a time, in NumPy and float64.


def reference_logits(config: ModelConfig, params: Any, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
    head = params["embedding" if config.tied_embeddings else "head"]
    rows = zip(batch["inputs"], batch["positions"], batch["segment_ids"], strict=True)
    hidden = np.stack([reference_row(config, params, *row) for row in rows])
    return hidden @ head[: config.vocab_size].T


def reference_row(config: ModelConfig, params: Any, tokens: Any, positions: Any, segments: Any) -> np.ndarray:
    x = params["embedding"][tokens]
    if config.positions == "learned":
        x = x + params["positions"][positions]
    if config.positions == "sinusoidal":
        angles = positions[:, None] / 10_000 ** (np.arange(0, config.width, 2) / config.width)
        x = x * np.sqrt(config.width) + np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    for kind, p in layers_of(config, params["decoder"]):
        sublayers = [
            ("mixer", lambda y, p=p, kind=kind: reference_attention(config, kind, p["mixer"], y, positions, segments)),
            ("feedforward", lambda y, p=p: reference_feedforward(config, p["feedforward"], y)),
        ]
        for name, sublayer in sublayers:
            is_output = config.norm_placement == "output"
            norm = partial(reference_norm, config, p[f"{name}_output_norm" if is_output else f"{name}_norm"])
            update = sublayer(norm(x) if config.norm_placement == "pre" else x)
            x = norm(x + update) if config.norm_placement == "post" else x + (norm(update) if is_output else update)
    return x if config.norm_placement == "post" else reference_norm(config, params["decoder"]["final_norm"], x)


def layers_of(config: ModelConfig, decoder: Any) -> list[tuple[LayerKind, Any]]:
    """The kind and the parameters of each layer, in order."""

    def apart(kinds: tuple[LayerKind, ...], stacked: Any, count: int) -> list[tuple[LayerKind, Any]]:
        places = [stacked] if "blocks" not in stacked else [stacked["blocks"][n] for n in range(len(kinds))]
        kinds = kinds[: len(places)]
        return [
            (kind, jax.tree.map(lambda leaf, number=number: leaf[number], place))
            for number in range(count)
            for kind, place in zip(kinds, places, strict=True)
        ]

    first = config.first_kinds
    before = apart(first, decoder["first"], len(first) if len(set(first)) == 1 else 1) if first else []
    return before + apart(config.kinds, decoder["layers"], config.num_periods)


def reference_norm(config: ModelConfig, p: Any, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True) if config.norm == "layernorm" else x
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * p["scale"] + p.get("bias", 0)


def linear(p: Any, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p.get("bias", 0)


def reference_attention(
    config: ModelConfig, kind: LayerKind, p: Any, x: np.ndarray, positions: Any, segments: Any
) -> np.ndarray:
    is_window = kind.pattern == "window"
    made = [linear(p[name], x) for name in ("query", "key", "value")]
    if config.qk_norm and config.qk_norm_over == "projection":
        made[:2] = [
            reference_norm(config, p[f"{name}_norm"], y) for name, y in zip(("query", "key"), made, strict=False)
        ]
    query, key, value = (y.reshape(len(x), -1, config.head_dim) for y in made)
    if config.positions == "rotary" and kind.has_positions:
        half, base = config.head_dim // 2, config.rotary_base
        base = config.window_rotary_base if is_window and config.window_rotary_base else base
        turn = np.exp(1j * positions[:, None, None] * base ** (-np.arange(half) / half))
        products = [(y[..., :half] + 1j * y[..., half:]) * turn for y in (query, key)]
        query, key = (np.concatenate([y.real, y.imag], axis=-1) for y in products)
    output = np.zeros_like(query)
    for t, n in np.ndindex(query.shape[:2]):
        seen = [s for s in range(t + 1) if segments[s] == segments[t] != 0]
        seen = [s for s in seen if t - s < config.window] if is_window else seen
        if seen:
            kv_head = n // (config.num_heads // config.kv_heads)
            weights = np.exp(key[seen, kv_head] @ query[t, n] / np.sqrt(config.head_dim))
            output[t, n] = weights / weights.sum() @ value[seen, kv_head]
    return linear(p["output"], output.reshape(len(x), -1))


def reference_feedforward(config: ModelConfig, p: Any, x: np.ndarray) -> np.ndarray:
    def gelu(y: np.ndarray) -> np.ndarray:
        return 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))

    hidden = linear(p["up"], x)
    if config.activation == "swiglu":
        gate = linear(p["gate"], x)
        hidden = hidden * gate / (1 + np.exp(-gate))
    elif config.activation == "geglu":
        hidden = hidden * gelu(linear(p["gate"], x))
    else:
        hidden = gelu(hidden) if config.activation == "gelu" else np.maximum(hidden, 0)
    return linear(p["down"], hidden)


@pytest.mark.parametrize(
    "changes",
    [
        {"biases": True, "positions": "learned", "attention_implementation": "causal_blocks"},
        {
            "positions": "rotary",
            "num_kv_heads": 2,
            "activation": "swiglu",
            "norm": "rmsnorm",
            "scan_layers": True,
            "attention_implementation": "causal_blocks",
        },
        {"positions": "sinusoidal", "norm_placement": "post", "activation": "relu", "biases": True},
        {"num_kv_heads": 1, "activation": "geglu", "tied_embeddings": False, "head_width": 12, "biases": True},
        {
            "num_layers": 5,
            "first_layers": "2*attention.window",
            "layers": "attention@none+attention.window+attention",
            "window": 3,
            "window_rotary_base": 20.0,
            "norm": "rmsnorm",
            "norm_placement": "output",
            "qk_norm": True,
            "qk_norm_over": "projection",
            "attention_biases": "qkv",
            "num_kv_heads": 2,
        },
    ],
    ids=["gpt2", "llama", "vaswani", "multi-query geglu", "first layers, norms of outputs"],
)
def test_logits_are_those_of_a_second_implementation(changes, model_config, batch):
    model, params = build(model_config, **changes)
    real = batch["segment_ids"] != 0
    expected = reference_logits(model.config, params, batch)
    actual = np.asarray(logits_of(model, params, batch))[..., : model_config.vocab_size]
    assert np.std(expected) > 0.1
    assert np.linalg.norm((actual - expected)[real]) < 1e-5 * np.linalg.norm(expected[real])


# Causality, documents, padding.


@pytest.mark.parametrize(("num_kv_heads", "scan_layers"), [(4, False), (2, True)], ids=["plain", "grouped scanned"])
@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
@pytest.mark.parametrize("norm_placement", ["pre", "post"])
def test_no_logit_depends_on_later_tokens_or_other_documents(
    norm_placement, positions, num_kv_heads, scan_layers, model_config
):
    length = 5
    model, params = build(
        model_config,
        vocab_size=128,
        num_heads=4,
        width=16,
        norm_placement=norm_placement,
        positions=positions,
        num_kv_heads=num_kv_heads,
        scan_layers=scan_layers,
        attention_implementation="causal_blocks" if scan_layers else "reference",
        tied_embeddings=False,  # or a logit would depend on the embedding of every token
    )
    # Each token occurs once, so that its row of the table is the embedding of one position.
    batch = {
        "inputs": np.arange(2 * length, dtype=np.int32).reshape(2, length),
        "positions": np.array([[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 1, 1], [1, 1, 2, 2, 0]], np.int32),
    }

    def logits(rows: jax.Array) -> jax.Array:
        table = params["embedding"].at[: 2 * length].set(rows)
        return traced_logits(model, params | {"embedding": table}, batch)[..., :4]

    jacobian_of = jax.jit(jax.jacrev(logits))
    jacobian = np.asarray(jacobian_of(params["embedding"][: 2 * length]))
    depends = np.any(jacobian != 0, axis=(2, 4))  # [row, position of the logit, token]
    segments = batch["segment_ids"]
    for row, t, token in np.ndindex(depends.shape):
        other, s = divmod(token, length)
        same = row == other and segments[row, s] == segments[row, t] and s <= t
        visible = same and (segments[row, t] != 0 or s == t)
        assert depends[row, t, token] == visible, (row, t, other, s)


@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal"])
def test_padding_packing_and_order_do_not_change_a_documents_loss(positions, model_config):
    model, params = build(model_config, positions=positions, num_kv_heads=2, attention_implementation="causal_blocks")
    rng = np.random.default_rng(0)
    documents = [rng.integers(4, 203, length + 1).astype(np.int32) for length in (5, 11, 3, 8, 1, 4)]

    def windows(rows: list[list[int]], left: int = 0) -> dict[str, np.ndarray]:
        names = ("inputs", "targets", "positions", "segment_ids")
        made = {name: np.zeros((len(rows), 16), np.int32) for name in names}
        for row, chosen in enumerate(rows):
            start = left
            for segment, number in enumerate(chosen, 1):
                tokens = documents[number]
                stop = start + len(tokens) - 1
                values = (tokens[:-1], tokens[1:], np.arange(stop - start), segment)
                for name, value in zip(names, values, strict=True):
                    made[name][row, start:stop] = value
                start = stop
        return made

    def losses(rows: list[list[int]], left: int = 0) -> dict[int, np.ndarray]:
        batch = windows(rows, left)
        all_losses = np.asarray(token_losses(model, params, batch))
        return {
            number: all_losses[row][batch["segment_ids"][row] == segment]
            for row, chosen in enumerate(rows)
            for segment, number in enumerate(chosen, 1)
        }

    alone = losses([[0], [1], [2], [3], [4], [5]])
    assert {number: len(values) for number, values in alone.items()} == {0: 5, 1: 11, 2: 3, 3: 8, 4: 1, 5: 4}
    for other in (
        losses([[0, 1], [2, 3, 4], [5], [], [], []]),
        losses([[], [5], [4, 3, 2], [], [1, 0], []]),
        losses([[5, 4, 3], [2, 1], [0], [], [], []]),
        losses([[0], [1], [2], [3], [4], [5]], left=5),
    ):
        for number, values in other.items():
            np.testing.assert_allclose(values, alone[number], rtol=2e-6, err_msg=str(number))


def test_order_of_the_batch_permutes_its_losses(model_config, batch):
    model, params = build(model_config)
    order = np.random.default_rng(0).permutation(8)
    shuffled = {name: values[order] for name, values in batch.items()}
    expected = np.asarray(token_losses(model, params, batch))[order]
    np.testing.assert_allclose(token_losses(model, params, shuffled), expected, rtol=1e-6)


def test_tokens_and_targets_of_padding_are_never_seen(model_config, batch):
    model, params = build(model_config)
    padding = batch["segment_ids"] == 0
    assert padding.any()
    noise = np.random.default_rng(1).integers(4, 203, padding.shape).astype(np.int32)
    other = batch | {name: np.where(padding, noise, batch[name]) for name in ("inputs", "targets")}
    loss, gradient = differentiated(model, params, batch)
    other_loss, other_gradient = differentiated(model, params, other)
    assert loss == other_loss
    assert distance(other_gradient, gradient) < 1e-7


# Scan, remat, dtype.


def multiplications(jaxpr: Any) -> int:
    """The number of matrix products in a program, those in inner programs included (a loop's body counts once)."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    own = sum(equation.primitive.name == "dot_general" for equation in jaxpr.eqns)
    return own + sum(map(multiplications, inner))


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_scan_and_remat_do_not_change_loss_and_gradient(dropout, model_config, batch):
    key = rapid_key(5) if dropout else None
    arms = list(itertools.product((False, True), ("none", "dots", "full")))[:: 2 if dropout else 1]
    models = [build(model_config, scan_layers=scan, remat=remat, dropout=dropout) for scan, remat in arms]
    expected, *others = (differentiated(model, params, batch, key) for model, params in models)
    for arm, actual in zip(arms[1:], others, strict=True):
        assert distance(actual, expected) < 2e-6, arm


def test_remat_policies_and_scan_are_different_programs(model_config, batch):
    products, work, memory = {}, {}, {}
    for scan_layers, remat in itertools.product((False, True), ("none", "dots", "full")):
        model, params = build(model_config, scan_layers=scan_layers, remat=remat)
        traced = differentiated.trace(model, params, batch)
        products[scan_layers, remat] = multiplications(traced.jaxpr.jaxpr)
        compiled: Any = traced.lower().compile()
        # The analysis counts the body of a loop once; the scheduler of XLA's CPU backend minds memory only between loops.
        if scan_layers:
            memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        else:
            work[remat] = compiled.cost_analysis()["flops"]
    for scan_layers in (False, True):
        # Four projections, two products of attention and two of the MLP a layer: `full` repeats all but the last.
        layers = 1 if scan_layers else model_config.num_layers
        plain = products[scan_layers, "none"]
        assert plain == 3 * (8 * layers + 1)
        assert plain < products[scan_layers, "dots"] <= plain + 2 * layers
        assert plain + 7 * layers <= products[scan_layers, "full"] <= plain + 8 * layers
    # The compiler did not merge the repeated products with the first ones.
    assert work["none"] < work["dots"] < 1.15 * work["none"] < work["full"]
    assert memory["full"] < memory["dots"] < memory["none"]


@pytest.mark.parametrize(
    ("names", "again"),
    [
        (("heads", "mixer_output", "feedforward_hidden"), 2),  # those of attention
        (("heads", "feedforward_hidden"), 3),  # and the projection of what it gathered
        (("mixer_output",), 6),
    ],
)
def test_named_activations_are_not_computed_again(names, again, model_config, batch):
    def traced(remat: str) -> Any:
        model, params = build(model_config, scan_layers=True, remat=remat, remat_names=names)
        return differentiated.trace(model, params, batch).jaxpr.jaxpr

    plain, kept, offloaded = (traced(remat) for remat in ("none", "names", "offload"))
    assert multiplications(kept) == multiplications(offloaded) == multiplications(plain) + again
    assert "pinned_host" in str(offloaded) or "<host>" in str(offloaded)
    assert "host" not in str(kept)


def test_nor_do_kept_or_offloaded_activations_change_the_gradient(model_config, batch):
    expected, *others = (
        differentiated(*build(model_config, scan_layers=True, remat=remat), batch)
        for remat in ("none", "names", "offload")
    )
    for actual in others:
        assert distance(actual, expected) < 2e-6


def test_dropout_acts_only_with_a_key_and_is_a_function_of_it(model_config, batch):
    model, params = build(model_config, dropout=0.3)
    plain, _ = build(model_config)
    np.testing.assert_array_equal(logits_of(model, params, batch), logits_of(plain, params, batch))
    one, again, other = (logits_of(model, params, batch, jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.any(np.all(one[..., :203] == other[..., :203], axis=-1))


def test_every_layer_and_sublayer_drops_on_its_own(model_config, batch, monkeypatch):
    masks = []

    def record(x: jax.Array, rate: float, key: Any) -> jax.Array:
        masks.append(np.asarray(jax.random.key_data(key)))
        return x

    for module in (blocks, transformer):
        monkeypatch.setattr(module, "dropout", record)
    model, params = build(model_config, dropout=0.3)
    apply(model, params, jax.tree.map(jnp.asarray, batch), jax.random.key(0))
    assert len(masks) == len({tuple(mask) for mask in masks}) == 1 + 2 * model_config.num_layers


def test_bfloat16_stays_close_to_float32(model_config, batch):
    exact, params = build(model_config)
    rough, _ = build(model_config, compute_dtype="bfloat16")
    outputs = apply(rough, params, jax.tree.map(jnp.asarray, batch))
    assert outputs.hidden.dtype == jnp.bfloat16
    assert outputs.logits(outputs.hidden).dtype == jnp.float32
    loss, gradient = differentiated(exact, params, batch)
    rough_loss, rough_gradient = differentiated(rough, params, batch)
    assert rough_loss == pytest.approx(float(loss), rel=2e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(rough_gradient)} == {jnp.dtype(jnp.float32)}
    assert 1e-5 < distance(rough_gradient, gradient) < 0.05


# Options and padding columns.

OPTIONS: dict[str, tuple[Any, ...]] = {
    "positions": ("rotary", "learned", "sinusoidal"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post", "output"),
    "activation": ("gelu", "relu", "swiglu", "geglu"),
    "num_kv_heads": (None, 2),
    "head_width": (None, 6),
    "biases": (False, True),
    "tied_embeddings": (True, False),
    "scan_layers": (False, True),
    "remat": ("none", "dots", "full"),
    "compute_dtype": ("float32", "bfloat16"),
    "dropout": (0.0, 0.2),
    "vocab_size": (203, 256),
}


def pairs(case: Mapping[str, Any]) -> set[Any]:
    return set(itertools.combinations(case.items(), 2))


def covering_cases() -> list[dict[str, Any]]:
    """Combinations among which every pair of values of two options occurs, found greedily."""
    draw = random.Random(0)
    left = set[Any]().union(
        *(
            itertools.product([(a, x) for x in OPTIONS[a]], [(b, y) for y in OPTIONS[b]])
            for a, b in itertools.combinations(OPTIONS, 2)
        )
    )
    cases = []
    while left:
        candidates = [{name: draw.choice(values) for name, values in OPTIONS.items()} for _ in range(300)]
        cases.append(max(candidates, key=lambda case: len(pairs(case) & left)))
        left -= pairs(cases[-1])
    return cases


@pytest.mark.parametrize("case", covering_cases(), ids=lambda case: "-".join(map(str, case.values())))
def test_every_pair_of_options_runs_forward_and_backward(case, model_config, batch):
    model, params = build(model_config, width=16, num_layers=2 if case["scan_layers"] else 1, **case)
    key = rapid_key(0) if case["dropout"] else None
    loss, gradient = differentiated(model, params, batch, key)
    assert math.isfinite(loss) and abs(loss - math.log(203)) < 2
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(leaf)), name
        # Softmax does not feel a bias of all keys, save through rotary positions.
        if "['key']['bias']" not in name:
            assert np.any(leaf != 0), name


@pytest.mark.parametrize("tied_embeddings", [True, False])
def test_padding_rows_of_the_vocabulary_get_no_probability_and_no_gradient(tied_embeddings, model_config, batch):
    model, params = build(model_config, tied_embeddings=tied_embeddings)
    logits = np.asarray(logits_of(model, params, batch))
    assert logits.shape == (8, 16, 256)
    assert np.all(logits[..., 203:] == MASKED_LOGIT) and np.all(logits[..., :203] > MASKED_LOGIT)
    assert np.all(np.asarray(jax.nn.softmax(logits))[..., 203:] == 0)
    _, gradient = differentiated(model, params, batch)
    for name in ("embedding",) if tied_embeddings else ("embedding", "head"):
        assert np.all(gradient[name][203:] == 0)
        assert np.any(gradient[name][:203] != 0)

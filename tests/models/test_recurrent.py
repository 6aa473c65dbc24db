"""Recurrent layers against loops over single tokens in double precision: segments, directions, what is read, caches."""

import dataclasses
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import SEGMENTS, SOURCE

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import map_cache, zeros
from transformer.models.masks import Tokens
from transformer.models.mixers import Context, Memory
from transformer.models.parameters import bind, init_parameters, map_specs, parameter_specs
from transformer.models.recurrence import CELLS
from transformer.models.recurrent import STATES, Recurrent, orthogonal
from transformer.models.transformer import Transformer, apply

KINDS = ("lstm", "gru", "mingru")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def step(mixer, state, x, product):
    """One token: `x` is what the input adds, `product` what the state does; returns the next state."""
    if mixer == "lstm":
        write, keep, candidate, show = np.split(x + product, 4)
        cell = sigmoid(keep) * state[1] + sigmoid(write) * np.tanh(candidate)
        return sigmoid(show) * np.tanh(cell), cell
    if mixer == "gru":
        reset, keep = (sigmoid(a + b) for a, b in zip(np.split(x, 3)[1:], np.split(product, 3)[:2], strict=True))
        candidate = np.tanh(np.split(x, 3)[0] + reset * np.split(product, 3)[2])
        return (keep * state[0] + (1 - keep) * candidate,)
    gate, candidate = np.split(x, 2)
    return ((1 - sigmoid(gate)) * state[0] + sigmoid(gate) * candidate,)


def passes(mixer, weights, x, segments, reading=None, memory=None, source=None):
    """Returns the outputs of one row, and what each token read."""
    width = weights["bias"].size // (CELLS[mixer].num_inputs if mixer in CELLS else 2)
    fresh = tuple(np.zeros(width) for _ in STATES[mixer])
    state, previous, outputs, contexts = fresh, None, np.zeros((len(x), width)), np.zeros((len(x), x.shape[1]))
    for t, segment in enumerate(segments):
        if segment == 0:
            continue
        state = state if segment == previous else fresh
        previous = segment
        inputs = x[t] @ weights["input"]["kernel"] + weights["bias"]
        if reading is not None and memory is not None and source is not None:
            places = np.flatnonzero(source == segment)
            if places.size:
                keys = memory[places] @ reading["key"]["kernel"] + reading["key"]["bias"]
                scores = np.tanh(keys + state[0] @ reading["query"]) @ reading["score"]
                share = np.exp(scores - scores.max())
                contexts[t] = share / share.sum() @ memory[places]
            inputs = inputs + contexts[t] @ reading["context"]
        product = state[0] @ weights["recurrent"] if "recurrent" in weights else None
        state = step(mixer, state, inputs, product)
        outputs[t] = state[0]
    return outputs, contexts


def reference(mixer, params, x, segments, memory=None, source=None):
    """The layer in float64, row by row and token by token."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x, rows = np.asarray(x, np.float64), []
    memory = None if memory is None else np.asarray(memory, np.float64)
    for row in range(len(x)):
        read = () if memory is None or source is None else (params["reading"], memory[row], source[row])
        output, context = passes(mixer, params["forward"], x[row], segments[row], *read)
        parts = [output] if memory is None else [output, context]
        if "backward" in params:
            parts.append(passes(mixer, params["backward"], x[row, ::-1], segments[row, ::-1])[0][::-1])
        joined = np.concatenate(parts, axis=-1)
        rows.append(joined @ params["output"]["kernel"] if "output" in params else joined)
    return np.stack(rows)


def config_of(**changes):
    return ModelConfig(**({"width": 12, "recurrent_width": 10, "scan_layers": False} | changes))


def drawn(module, scale=1.0, seed=0) -> Any:
    """Random parameters."""
    rng = np.random.default_rng(seed)
    return map_specs(
        lambda spec: jnp.asarray(scale * rng.standard_normal(spec.shape), jnp.float32), parameter_specs(module)
    )


@cache
def layer_of(mixer, causal=True, reads_memory=False, seed=0, **changes) -> Any:
    """A layer and random parameters."""
    layer = Recurrent(config_of(**changes), LayerKind(mixer), 2, causal, reads_memory)
    return layer, drawn(layer, 0.4, seed)


def tokens_of(segments):
    segments = jnp.asarray(segments, jnp.int32)
    return Tokens(jnp.zeros_like(segments), segments)


def context_of(segments, source=None, memory=None, causal=True):
    tokens = tokens_of(segments)
    read = None if source is None else Memory(memory, tokens_of(source))
    return Context(tokens, tokens, memory=read, causal=causal)


def random(*shape, seed=1) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@cache
def forward_of(layer) -> Any:
    return jax.jit(lambda params, x, context: bind(layer, params)(x, context, None, 0)[0])


def close(actual, expected, tolerance=2e-6):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize(("causal", "recurrent_width"), [(True, 12), (False, 10)])
@pytest.mark.parametrize("mixer", KINDS)
def test_a_layer_is_a_loop_over_tokens(mixer, causal, recurrent_width):
    """Packed segments, with padding wherever it may stand; in both directions where the future is seen."""
    layer, params = layer_of(mixer, causal, recurrent_width=recurrent_width)
    assert ("output" in params) == (recurrent_width != 12)
    x = random(*SEGMENTS.shape, 12)
    actual = forward_of(layer)(params, x, context_of(SEGMENTS, causal=causal))
    close(actual, reference(mixer, params, x, SEGMENTS))
    assert np.all(np.asarray(actual)[SEGMENTS == 0] == 0)


@pytest.mark.parametrize("mixer", ["lstm", "gru"])
def test_a_state_reads_the_source_of_its_segment_step_by_step(mixer):
    layer, params = layer_of(mixer, reads_memory=True)
    x, memory = random(*SEGMENTS.shape, 12), random(*SOURCE.shape, 12, seed=2)
    actual = forward_of(layer)(params, x, context_of(SEGMENTS, SOURCE, memory))
    close(actual, reference(mixer, params, x, SEGMENTS, memory, SOURCE))
    changed = forward_of(layer)(params, x, context_of(SEGMENTS, SOURCE, memory.at[1, 2:].add(1.0)))
    moved = np.any(np.asarray(actual) != np.asarray(changed), axis=-1)
    np.testing.assert_array_equal(moved, (np.arange(4)[:, None] == 1) & (SEGMENTS == 3))


@pytest.mark.parametrize("mixer", ["gru", "mingru"])
def test_gradients_stay_finite_where_gates_saturate_and_rows_are_empty(mixer):
    layer, params = layer_of(mixer, reads_memory=mixer != "mingru")
    source = np.where(np.arange(4)[:, None] == 0, 0, SOURCE)
    memory = None if mixer == "mingru" else 1e3 * random(*SOURCE.shape, 12)
    context = context_of(SEGMENTS, None if memory is None else source, memory)

    def loss(params, x):
        return jnp.sum(jnp.square(bind(layer, params)(x, context, None, 0)[0]))

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, 1e3 * random(*SEGMENTS.shape, 12))
    assert np.isfinite(value) and value > 0
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    assert np.all(np.asarray(gradients[1])[SEGMENTS == 0] == 0)


@pytest.mark.parametrize(
    ("mixer", "causal", "reads"),
    [("lstm", True, True), ("mingru", True, False), ("gru", False, False)],
)
def test_what_an_output_depends_on(mixer, causal, reads):
    """On its own segment, all of it in an encoder and nothing later in a decoder."""
    layer, params = layer_of(mixer, causal, reads)
    x, memory = random(*SEGMENTS.shape, 12), random(*SOURCE.shape, 12, seed=2) if reads else None
    context = context_of(SEGMENTS, SOURCE if reads else None, memory, causal)

    def output_of(params, x):
        return bind(layer, params)(x, context, None, 0)[0]

    @jax.jit
    def influence(params, x):
        def of_token(t):
            return jax.grad(lambda x: jnp.sum(jnp.sin(output_of(params, x)[:, t])))(x)

        return jnp.any(jax.vmap(of_token)(jnp.arange(x.shape[1])) != 0, axis=-1)  # [T, B, S]

    seen = np.asarray(influence(params, x)).swapaxes(0, 1)
    length = SEGMENTS.shape[1]
    past = np.arange(length)[None, :] <= np.arange(length)[:, None]
    same = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :]) & (SEGMENTS[:, :, None] != 0)
    np.testing.assert_array_equal(seen, past & same if causal else same)


CALLS = {"one by one": [1] * 10, "a prompt, then single tokens": [6, 1, 1, 1, 1]}


@pytest.mark.parametrize(("mixer", "reads"), [("lstm", False), ("gru", True), ("mingru", False)])
def test_decoding_gives_what_one_pass_gives(mixer, reads):
    """The source is read in the first call; segments may begin, and padding may stand, in any."""
    layer, params = layer_of(mixer, reads_memory=reads)
    x, memory = random(*SEGMENTS.shape, 12), random(*SOURCE.shape, 12, seed=2) if reads else None
    source = SOURCE if reads else None
    whole = forward_of(layer)(params, x, context_of(SEGMENTS, source, memory))
    specs = layer.cache_specs(4, 10, *([SOURCE.shape[1]] if reads else []))
    assert {name: spec.shape for name, spec in specs.items()} == (
        {name: (4, 10) for name in STATES[mixer]} | ({"key": (4, 7, 10), "value": (4, 7, 12)} if reads else {})
    )
    advance = jax.jit(lambda params, x, context, cache: bind(layer, params)(x, context, cache, 1))
    for calls in CALLS.values():
        cache = zeros(map_cache(lambda spec: spec.stacked(2), specs))
        columns, outputs, at = np.zeros_like(SEGMENTS), [], 0
        for size in calls:
            new = slice(at, at + size)
            columns[:, new] = SEGMENTS[:, new]
            known = None if source is None else Memory(memory if at == 0 else None, tokens_of(source))
            context = Context(tokens_of(SEGMENTS[:, new]), tokens_of(columns), jnp.int32(at), memory=known)
            output, cache = advance(params, x[:, new], context, cache)
            outputs.append(output)
            at += size
        close(jnp.concatenate(outputs, axis=1), whole, 1e-6)
        assert all(np.all(np.asarray(array[0]) == 0) for array in cache.values()), "another layer's state was written"


@pytest.mark.parametrize("mixer", KINDS)
def test_gates_that_keep_start_open_and_recurrent_matrices_orthogonal(mixer):
    layer = Recurrent(config_of(), LayerKind(mixer), 2, True, False)
    params = jax.jit(lambda: init_parameters(layer, jax.random.key(0)))()["forward"]
    expected = np.zeros((len(params["bias"]) // 10, 10))
    if mixer != "mingru":
        expected[2 if mixer == "gru" else 1] = 1
        for block in np.split(np.asarray(params["recurrent"], np.float64), len(expected), axis=1):
            np.testing.assert_allclose(block.T @ block, np.eye(10), atol=1e-5)
    np.testing.assert_array_equal(params["bias"], expected.ravel())
    assert abs(np.std(params["input"]["kernel"]) * np.sqrt(12) - 1) < 0.2
    roles = {spec.role for spec in jax.tree.leaves(parameter_specs(layer), is_leaf=lambda x: hasattr(x, "role"))}
    assert roles == {"matrix", "bias"}


@pytest.mark.parametrize("many", [False, True], ids=["one layer", "scanned layers"])
def test_matrices_are_factorised_one_at_a_time(many):
    # On a CPU a batch of factorisations waits inside XLA's pool of threads for that pool, and may do so for ever.
    draw = partial(orthogonal, shape=(8, 24))
    argument = jax.random.split(jax.random.key(0), 5) if many else jax.random.key(0)
    text = jax.jit(jax.vmap(draw) if many else draw).lower(argument).as_text()
    products = re.findall(r"custom_call @lapack_sgeqrf\w*\(.*: \(tensor<([\dx]+)xf32>", text)
    assert products and set(products) == {"8x8"}


@cache
def pair_model(cross_attention) -> Any:
    """An encoder-decoder, its logits as a function, random parameters, and a packed batch of pairs."""
    layers = {"layers": "gru/none", "num_layers": 2, "encoder_layers": "lstm/none", "num_encoder_layers": 1}
    config = config_of(architecture="encoder_decoder", vocab_size=30, cross_attention=cross_attention)
    config = dataclasses.replace(config, **layers)
    model = Transformer(config)
    rng = np.random.default_rng(0)
    params = drawn(model, 0.3)
    batch = {
        "inputs": rng.integers(0, 30, SEGMENTS.shape),
        "positions": np.zeros_like(SEGMENTS),
        "segment_ids": SEGMENTS,
        "encoder_inputs": rng.integers(0, 30, SOURCE.shape),
        "encoder_positions": np.zeros_like(SOURCE),
        "encoder_segment_ids": SOURCE,
    }
    forward = jax.jit(logits_of(model))
    return model, forward, params, {name: jnp.asarray(array, jnp.int32) for name, array in batch.items()}


def logits_of(model):
    def logits(params, batch, cache=None):
        outputs = apply(model, params, batch, cache=cache)
        return outputs.logits(outputs.hidden)[..., :30], outputs.cache

    return logits


@pytest.mark.parametrize("cross_attention", ["bahdanau", "luong"])
def test_packed_pairs_are_separate_pairs(cross_attention):
    _, forward, params, batch = pair_model(cross_attention)
    packed, _ = forward(params, batch)
    # Each pair in a row of its own, from its first column on.
    alone = {name: np.zeros((8, array.shape[1]), np.int32) for name, array in batch.items()}
    places = [(row, s) for row in range(len(SEGMENTS)) for s in np.unique(SEGMENTS[row]) if s]
    places = [(row, s) for row, s in places if s in SOURCE[row]]
    for number, (row, segment) in enumerate(places):
        for prefix, ids in (("", SEGMENTS), ("encoder_", SOURCE)):
            chosen = np.flatnonzero(ids[row] == segment)
            alone[f"{prefix}inputs"][number, : chosen.size] = batch[f"{prefix}inputs"][row, chosen]
            alone[f"{prefix}segment_ids"][number, : chosen.size] = 1
    halves = [{name: jnp.asarray(array[rows]) for name, array in alone.items()} for rows in (slice(4), slice(4, 8))]
    logits = np.concatenate([forward(params, half)[0] for half in halves])
    assert len(places) == 6
    for number, (row, segment) in enumerate(places):
        chosen = np.flatnonzero(SEGMENTS[row] == segment)
        close(logits[number, : chosen.size], packed[row, chosen], 1e-5)


def test_a_plain_lstm_is_nothing_but_its_cells():
    """Without norms, residuals and MLPs: embedding, two layers, and the head."""
    layers = {"layers": "lstm/none", "norm": "none", "residuals": False, "recurrent_width": None, "num_layers": 2}
    model = Transformer(config_of(vocab_size=30, **layers))
    rng = np.random.default_rng(0)
    params = drawn(model)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    mixer = "decoder/layers/mixer/forward/"
    assert names == [f"{mixer}{name}" for name in ("bias", "input/kernel", "recurrent")] + ["embedding"]
    inputs = rng.integers(0, 30, SEGMENTS.shape)
    batch = {"inputs": inputs, "positions": np.zeros_like(SEGMENTS), "segment_ids": SEGMENTS}
    logits, _ = jax.jit(logits_of(model))(params, jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch))
    table = np.asarray(params["embedding"], np.float64)
    expected = table[inputs]
    for layer in range(2):
        own = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["decoder"]["layers"]["mixer"])
        expected = reference("lstm", own, expected, SEGMENTS)
    close(logits, expected @ table[:30].T, 1e-5)

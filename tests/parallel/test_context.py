"""Texts split over devices: attention by ring and all-to-all, mixers that pass their state, whole models."""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from transformer.config import MESH_AXES, Config, ConfigError, replace
from transformer.models import blockwise
from transformer.models.biases import Alibi, RelativeBuckets, alibi_slopes
from transformer.models.dot_product import attend, dot_product_attention
from transformer.models.masks import Mask, Tokens
from transformer.models.parameters import init_parameters, is_spec, parameter_specs
from transformer.models.patterns import Pattern
from transformer.models.ring import plan, runs_of
from transformer.models.transformer import Transformer, apply, empty_cache
from transformer.parallel.sharding import batch_sharding, global_array, local_rows, make_mesh, sharding
from transformer.training.step import make_gradient

SLOW = pytest.mark.slow


def mesh_of(of: Sequence[Any] = (), /, **sizes: int) -> Mesh:
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.asarray((of or jax.devices())[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def tokens_of(rows: int, length: int, seed: int = 0, prefix: bool = False) -> Tokens:
    """Returns packed texts, one row of which ends in padding."""
    rng = np.random.default_rng(seed)
    starts = (rng.random((rows, length)) < 5 / length) | (np.arange(length) == 0)
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    positions = np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    segments[0, -length // 4 :] = 0
    known = jnp.asarray(positions < 3) if prefix else None
    return Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(segments), known)


def assert_equal(actual: Any, expected: Any) -> None:
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        one, other = jax.device_get((one, other))
        distance, norm = np.linalg.norm(one - other), np.linalg.norm(other)
        assert norm > 0 and distance <= 1e-5 * norm, (jax.tree_util.keystr(path), distance / norm)


# Attention.


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in each device's part of 64 tokens, some of them short."""
    monkeypatch.setattr(blockwise, "BLOCK", 8)
    monkeypatch.setattr(blockwise, "SMALLEST", 4)


@dataclass(frozen=True)
class Case:
    """One attention, of six heads that share two of keys, and the mesh that it is split over."""

    mesh: dict[str, int]
    causal: bool = True
    prefix: bool = False
    sparsity: Pattern | None = None
    bias: str | None = None
    soft_cap: float = 0.0
    source: int | None = None
    """Length of another text that is read; None: its own."""
    split: str = "ring"
    heads: tuple[int, int] = (6, 2)
    length: int = 64


WINDOW = Pattern("window", window=7)
SPARSE = Pattern("block_sparse", block=4, num_global=1, num_window=3, num_random=1)
CASES = {
    # Six heads do not divide by 4 and stay whole; by 2 they do.
    "causal over 8": (Case({"context": 8}), ()),
    "causal over 2, heads whole": (Case({"context": 2, "tensor": 4}), SLOW),
    "causal, a part of odd length": (Case({"context": 4}, length=60), SLOW),
    "bidirectional": (Case({"context": 4}, causal=False), SLOW),
    "prefix": (Case({"context": 4}, prefix=True), SLOW),
    "window": (Case({"context": 8}, sparsity=WINDOW), SLOW),
    "window both ways": (Case({"context": 8}, causal=False, sparsity=WINDOW), ()),
    "sinks": (Case({"context": 4}, sparsity=Pattern("window", window=7, num_sinks=2)), SLOW),
    "dilated": (Case({"context": 4}, sparsity=Pattern("dilated", window=4, dilation=3)), SLOW),
    "block sparse": (Case({"context": 4}, sparsity=SPARSE), SLOW),
    "relative positions, soft cap, all axes": (
        Case({"fsdp": 2, "context": 2, "tensor": 2}, bias="relative", soft_cap=5.0),
        (),
    ),
    "slopes": (Case({"replica": 2, "context": 4}, bias="alibi"), SLOW),
    "another text": (Case({"fsdp": 2, "context": 4}, causal=False, source=40), SLOW),
    "all to all": (Case({"fsdp": 2, "context": 2}, split="all_to_all"), SLOW),
    "all to all, relative positions": (
        Case({"context": 4, "tensor": 2}, split="all_to_all", heads=(8, 2), bias="relative"),
        (),
    ),
    "all to all, another text": (
        Case({"context": 2}, split="all_to_all", causal=False, source=40),
        SLOW,
    ),
}


def value_and_gradients(function: Callable[..., Any], *arrays: Any, ahead: Any) -> Any:
    @jax.jit
    def both(ahead: Any, *arrays: Any) -> Any:
        output, back = jax.vjp(function, *arrays)
        return output, back(ahead)

    return both(ahead, *arrays)


@pytest.mark.parametrize("case", [pytest.param(case, id=name, marks=mark) for name, (case, mark) in CASES.items()])
def test_attention_over_parts_is_that_of_the_whole(case: Case, small_blocks: None) -> None:
    rng = np.random.default_rng(0)
    queries = tokens_of(4, case.length, prefix=case.prefix)
    keys = queries if case.source is None else tokens_of(4, case.source, 1)
    mask = Mask(queries, keys, case.causal, case.source is None, case.sparsity)
    num_heads, kv_heads = case.heads
    table = rng.normal(size=(8, num_heads)).astype(np.float32)
    bias = {
        None: None,
        "relative": RelativeBuckets(jnp.asarray(table), case.causal, 20),
        "alibi": Alibi(jnp.asarray(alibi_slopes(num_heads))),
    }[case.bias]
    source = case.source or case.length
    shapes = [(4, case.length, num_heads, 8), (4, source, kv_heads, 8), (4, source, kv_heads, 10)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    ahead = rng.normal(size=(*shapes[0][:3], 10)).astype(np.float32)

    def run(function: Any) -> Any:
        def attention(query: Any, key: Any, value: Any, bias: Any) -> Any:
            return function(query, key, value, mask, bias=bias, soft_cap=case.soft_cap)

        return value_and_gradients(attention, *arrays, bias, ahead=ahead)

    expected = run(dot_product_attention)
    with jax.set_mesh(mesh_of(**case.mesh)):
        actual = run(functools.partial(attend, "auto", split=case.split))
    assert_equal(actual, expected)
    assert not np.any(actual[0][0, -case.length // 4 :]), "padding sees nothing"


def test_a_ring_of_long_texts() -> None:
    rng = np.random.default_rng(0)
    tokens = tokens_of(1, 2048)
    arrays = [rng.normal(size=(1, 2048, heads, 16)).astype(np.float32) for heads in (2, 1, 1)]
    ahead = rng.normal(size=arrays[0].shape).astype(np.float32)
    mask = Mask(tokens, tokens)

    def run(function: Any) -> Any:
        return value_and_gradients(lambda *arrays: function(*arrays, mask), *arrays, ahead=ahead)

    expected = run(dot_product_attention)
    with jax.set_mesh(mesh_of(context=8)):
        assert_equal(run(functools.partial(attend, "auto")), expected)


def whole_text(length: int, causal: bool = True, sparsity: Pattern | None = None) -> Mask:
    tokens = Tokens(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))
    return Mask(tokens, tokens, causal, True, sparsity)


@pytest.mark.parametrize("num_devices", [2, 4, 8, 16])
def test_causal_work_is_even(num_devices: int) -> None:
    """The kernel's own list: blocks are all of one size, so that their numbers are to each other as FLOPs are."""
    ring = plan(whole_text(32768), num_devices)
    assert ring.num_runs == 2
    work = ring.num_pairs
    assert work.shape == (num_devices, num_devices)
    assert work.max() > 0 and np.all(work.max(axis=0) <= 1.05 * work.min(axis=0)), (
        "in every step, for all wait at its end"
    )
    pairs, blocks = work.sum(), 32768 // ring.rows
    assert pairs == blocks * (blocks + 1) // 2, "half of the square"


@pytest.mark.parametrize(
    ("causal", "sparsity", "steps"),
    [
        (True, None, 8),
        (False, None, 8),
        (True, WINDOW, 2),
        (False, WINDOW, 3),
        (True, Pattern("window", window=7, num_sinks=1), 8),
    ],
)
def test_every_visible_pair_is_met_once(causal: bool, sparsity: Any, steps: int, small_blocks: None) -> None:
    mask = whole_text(128, causal, sparsity)
    ring = plan(mask, 8)
    assert ring.spans.shape[1] == steps, "no step without work"
    runs, run = runs_of(8, ring.num_runs), 16 // ring.num_runs
    met = np.zeros((128, 128), int)
    for device, in_step, pair in np.ndindex(ring.spans.shape[:3]):
        block, of_keys = divmod(pair, ring.num_runs)
        of_queries, inside = divmod(block, -(-run // ring.rows))
        source = (device - ring.first - in_step) % 8
        start, stop = ring.spans[device, in_step, pair] - of_keys * -(-run // ring.columns)
        row = runs[device, of_queries] * run + inside * ring.rows
        column = runs[source, of_keys] * run
        columns = slice(column + max(0, start) * ring.columns, column + min(run, max(0, stop) * ring.columns))
        met[row : row + min(ring.rows, run - inside * ring.rows), columns] += 1
    assert met.max() == 1
    assert np.all(met[np.asarray(mask.visible()[0])] == 1)


def temporary_bytes(
    num_devices: int, num_heads: int = 8, num_kv_heads: int = 2, dtype: Any = jnp.float32, of: Sequence[Any] = ()
) -> int:
    """Returns the temporaries of causal attention and its gradient over 32,768 tokens, on each device, not run."""
    mesh = mesh_of(of, context=num_devices)
    layout = NamedSharding(mesh, PartitionSpec(None, "context"))

    def loss(query: Any, key: Any, value: Any, positions: Any, segments: Any) -> Any:
        tokens = Tokens(positions, segments)
        output = attend("blockwise", query, key, value, Mask(tokens, tokens))
        return jnp.sum(jnp.square(output.astype(jnp.float32)))

    shapes = [(1, 32768, heads, 64) for heads in (num_heads, num_kv_heads, num_kv_heads)]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=layout) for shape in shapes]
    places = [jax.ShapeDtypeStruct((1, 32768), jnp.int32, sharding=layout)] * 2
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), out_shardings=(layout,) * 3)
        memory: Any = gradient.lower(*arrays, *places).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dtype", "most"),
    [
        (8, 2, jnp.float32, 1.5),
        pytest.param(8, 2, jnp.bfloat16, 1.5, marks=pytest.mark.slow),
        pytest.param(8, 8, jnp.bfloat16, 1.5, marks=pytest.mark.slow),
        # What travels, twice over, weighs most here.
        pytest.param(4, 4, jnp.float32, 1.75, marks=pytest.mark.slow),
    ],
)
def test_the_memory_of_a_ring_is_that_of_a_devices_part(
    num_heads: int, num_kv_heads: int, dtype: Any, most: float
) -> None:
    heads = (num_heads, num_kv_heads, dtype)
    one, eight = (temporary_bytes(count, *heads) for count in (1, 8))
    print(f"{one / 2**20:.1f} MiB on one device, {eight / 2**20:.1f} on each of 8: {8 * eight / one:.2f}")
    assert eight <= most / 8 * one


@SLOW
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "dtype"),
    [(8, 2, jnp.float32), (8, 2, jnp.bfloat16), (8, 8, jnp.bfloat16), (4, 4, jnp.float32)],
)
def test_the_memory_of_a_ring_of_tpus(num_heads: int, num_kv_heads: int, dtype: Any) -> None:
    chips = topologies.get_topology_desc("v5e:2x4", platform="tpu").devices
    held = {n: temporary_bytes(n, num_heads, num_kv_heads, dtype, chips) for n in (1, 2, 4, 8)}
    print(", ".join(f"{size / 2**20:.1f} MiB on each of {n}" for n, size in held.items()))
    assert 8 * held[8] <= 1.5 * held[1]
    assert all(n * held[n] <= 1.1 * 2 * held[2] for n in (4, 8)), "it falls as fast as the number of chips grows"


@SLOW
def test_the_memory_of_a_ring_falls_with_the_number_of_devices() -> None:
    two, four, eight = map(temporary_bytes, (2, 4, 8))
    assert four <= 1.1 * two / 2 and eight <= 1.1 * four / 2


# Whole models.

MODELS: dict[str, dict[str, Any]] = {
    "decoder": {
        "model": {
            "num_heads": 4,
            "num_kv_heads": 2,
            "positions": "rotary",
            "scan_layers": True,
            "remat": "full",
        },
        "objective": {"logit_chunk": 8},
    },
    "hybrid": {"model": {"layers": "mamba2/none+attention+gated_delta_net/none", "num_layers": 3}},
    **{
        mixer: {"model": {"layers": f"{mixer}/none", "num_layers": 1}}
        for mixer in ("linear_attention", "retention", "gated_linear_attention", "performer")
    },
    "mingru": {"model": {"layers": "mingru/none", "num_layers": 1, "positions": "none"}},
    "latent": {"model": {"layers": "latent_attention", "latent_width": 8, "rotary_head_width": 4, "num_layers": 1}},
    "encoder and decoder": {
        "model": {
            "architecture": "encoder_decoder",
            "positions": "relative",
            "num_relative_buckets": 8,
            "num_layers": 1,
        },
        "objective": {"name": "span_corruption"},
        "data": {"source_length": 80},
    },
    "recurrent encoder": {
        "model": {
            "architecture": "encoder_decoder",
            "layers": "mingru/none",
            "cross_attention": "luong",
            "positions": "none",
            "num_layers": 1,
        },
        "objective": {"name": "span_corruption"},
        "data": {"source_length": 80},
    },
    "swapped": {"model": {"context_attention": "all_to_all", "num_layers": 1}},
}


@pytest.fixture(scope="module")
def gradient(tiny_config) -> Callable[..., Any]:
    """Computes gradient and loss of a model on a mesh; returns the compiled program too."""

    @functools.cache
    def computed(name: str, **parallel: int) -> tuple[Any, Any]:
        config = configured(tiny_config, name, parallel)
        mesh = make_mesh(
            config, jax.devices()[: int(np.prod(list(parallel.values())))] if parallel else jax.devices()[:1]
        )
        model = Transformer(config.model)
        layouts = jax.tree.map(lambda s: sharding(mesh, s.axes, s.shape), parameter_specs(model), is_leaf=is_spec)
        params = jax.device_put(init_parameters(model, jax.random.key(0, impl="unsafe_rbg")), layouts)
        with jax.set_mesh(mesh):
            batch = jax.device_put(made_up(config), batch_sharding(mesh))
            step = jax.jit(functools.partial(make_gradient(config, model, layouts), key=None))
            program = step.lower(params, batch).compile()
            gradients, metrics = program(params, batch)
        return jax.device_get((gradients, metrics["loss"])), program

    return computed


def configured(tiny_config: Any, name: str, parallel: dict[str, int]) -> Config:
    changes = {"data": {"sequence_length": 48}, "train": {"batch_size": 4}, "parallel": {"fsdp": 1} | parallel}
    small = {"num_positions": 80, "chunk_length": 4, "positions": "none"}
    changes |= {part: changes.get(part, {}) | values for part, values in MODELS[name].items()}
    return tiny_config(**changes | {"model": small | MODELS[name]["model"]})


def made_up(config: Config) -> dict[str, np.ndarray]:
    """Returns a batch with short texts, and long stretches of padding between their tokens."""
    rng, rows = np.random.default_rng(0), config.train.batch_size

    def text(length: int, prefix: str = "") -> dict[str, np.ndarray]:
        tokens = tokens_of(rows, length)
        segments = np.array(tokens.segment_ids)
        segments[1, 3 : 3 + length // 2] = 0
        segments[2, rng.random(length) < 0.5] = 0
        inputs = rng.integers(4, config.model.vocab_size, (rows, length), dtype=np.int32)
        batch = {"inputs": inputs, "positions": np.asarray(tokens.positions), "segment_ids": segments}
        return {f"{prefix}{name}": values for name, values in batch.items()}

    length = config.data.sequence_length
    batch = text(length)
    batch["targets"] = rng.integers(4, config.model.vocab_size, (rows, length), dtype=np.int32)
    batch["weights"] = ((rng.random((rows, length)) < 0.7) & (batch["segment_ids"] != 0)).astype(np.float32)
    if config.model.has_encoder and config.model.has_decoder:
        batch |= text(config.data.source_length or length, "encoder_")
    return batch


ALL_AXES = {"fsdp": 2, "context": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        pytest.param("decoder", ALL_AXES, id="decoder"),
        pytest.param("decoder", {"context": 8}, marks=SLOW, id="decoder, alone"),
        pytest.param("decoder", {"fsdp": 2, "context": 4}, marks=SLOW, id="decoder, fsdp"),
        pytest.param("decoder", {"context": 4, "tensor": 2}, marks=SLOW, id="decoder, tensor"),
        pytest.param("hybrid", {"context": 4}, marks=SLOW, id="hybrid, alone"),
        pytest.param("hybrid", ALL_AXES, marks=SLOW, id="hybrid"),
        pytest.param("linear_attention", {"context": 8}, marks=SLOW, id="linear attention"),
        pytest.param("retention", ALL_AXES, marks=SLOW, id="retention"),
        pytest.param("gated_linear_attention", {"fsdp": 2, "context": 4}, marks=SLOW, id="gated linear attention"),
        pytest.param("performer", {"context": 4, "tensor": 2}, marks=SLOW, id="performer"),
        pytest.param("mingru", {"fsdp": 2, "context": 4}, marks=SLOW, id="mingru"),
        pytest.param("latent", ALL_AXES, marks=SLOW, id="latent"),
        pytest.param("encoder and decoder", ALL_AXES, id="encoder and decoder"),
        pytest.param("encoder and decoder", {"context": 8}, marks=SLOW, id="encoder and decoder, alone"),
        pytest.param("recurrent encoder", {"context": 4}, marks=SLOW, id="recurrent encoder"),
        pytest.param("swapped", ALL_AXES, marks=SLOW, id="swapped"),
    ],
)
def test_a_split_model_computes_what_one_device_does(name: str, parallel: dict[str, int], gradient: Any) -> None:
    (gradients, loss), program = gradient(name, **parallel)
    (expected, loss_alone), _ = gradient(name)
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
    assert_equal(gradients, expected)
    assert not whole_lengths(program.as_text(), (48, 80)), "whole texts travel"


def whole_lengths(hlo: str, lengths: tuple[int, ...]) -> list[str]:
    """Returns the shapes that travel with the length of a whole text, and with a width besides."""
    collective = r"= (\(?\w+\[.*?) (?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\("
    shapes = [shape for types in re.findall(collective, hlo) for shape in re.findall(r"\[([\d,]+)\]", types)]
    dims = [[int(dim) for dim in shape.split(",")] for shape in shapes]
    return [str(shape) for shape in dims if len(shape) > 2 and set(shape) & set(lengths)]


@SLOW
def test_a_cache_on_a_mesh_that_splits_texts(tiny_config) -> None:
    config = tiny_config(
        model={"positions": "rotary", "layers": "attention+mamba2/none"}, parallel={"fsdp": 1, "context": 2}
    )
    model = Transformer(config.model)
    params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
    tokens = np.random.default_rng(0).integers(4, 200, (2, 9), dtype=np.int32)

    def run(params: Any, batch: Any, cache: Any) -> Any:
        outputs = apply(model, params, batch, cache=cache)
        return outputs.cache, outputs.hidden

    def generated() -> Any:
        cache, states = empty_cache(model, 2, 12), []
        for start, stop in ((0, 8), (8, 9)):  # a prompt that divides, and a token that does not
            places = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (2, stop - start))
            batch = {"inputs": tokens[:, start:stop], "positions": places, "segment_ids": np.ones_like(places)}
            cache, hidden = jax.jit(run)(params, batch, cache)
            states.append(hidden)
        return jax.device_get(states)

    expected = generated()
    with jax.set_mesh(make_mesh(config, jax.devices()[:2])):
        assert_equal(generated(), expected)


# What cannot be split, and how batches lie.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"sequence_length": 18}}, ["data.sequence_length = 18 is not divisible by parallel.context = 4"]),
        (
            {
                "data": {"sequence_length": 18, "source_length": 22},
                "model": {"architecture": "encoder_decoder"},
                "objective": {"name": "span_corruption"},
            },
            ["data.sequence_length = 18 and data.source_length = 22 are not divisible by parallel.context = 4"],
        ),
        (
            {"model": {"layers": "attention+lstm/none"}},
            ["lstm computes one token after another", "parallel.context = 4"],
        ),
        ({"model": {"layers": "gru/none"}}, ["gru computes one token after another"]),
        (
            {"model": {"attention_implementation": "causal_blocks"}},
            ["model.attention_implementation = 'causal_blocks'", "model.context_attention = 'all_to_all'"],
        ),
        (
            {"model": {"context_attention": "all_to_all", "num_heads": 6, "width": 48}},
            ["model.num_heads = 6 is not divisible by parallel.context = 4 x parallel.tensor = 2; use 'ring'"],
        ),
    ],
)
def test_what_cannot_be_split_is_refused(changes: dict[str, Any], words: list[str], tiny_config) -> None:
    config = tiny_config(**{"model": {"positions": "none"}} | changes, parallel={"fsdp": 1, "context": 4, "tensor": 2})
    with pytest.raises(ConfigError) as caught:
        make_mesh(config)
    assert len(caught.value.problems) == 1 and all(word in str(caught.value) for word in words)
    if "data" not in changes:
        make_mesh(replace(config, parallel={"fsdp": 4, "context": 1, "tensor": 2}))


def test_a_batch_lies_by_rows_and_columns() -> None:
    mesh = mesh_of(fsdp=2, context=4)
    rows = local_rows(mesh, 4)
    assert rows == [0, 1, 2, 3]
    values = np.arange(32, dtype=np.int32).reshape(4, 8)
    with jax.transfer_guard("disallow"):
        batch = global_array(mesh, rows, 4, {"inputs": values})
    assert batch["inputs"].sharding == batch_sharding(mesh)
    assert {shard.data.shape for shard in batch["inputs"].addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(batch["inputs"], values)

"""Every implementation of attention against the definition in double precision; what is refused, chosen and printed."""

import dataclasses
import logging
import sys
import types
from functools import cache, partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from transformer.arguments import parse
from transformer.cli import ImplementationsOptions, implementations
from transformer.config import Config, ConfigError, ModelConfig, problems_of, replace
from transformer.config.implementations import IMPLEMENTATIONS, MASKS, Asked
from transformer.models import blockwise, causal_blocks, dot_product, kernels
from transformer.models.biases import Alibi, RelativeBuckets, alibi_slopes
from transformer.models.dot_product import attend, dot_product_attention, kinds
from transformer.models.masks import Mask, Tokens
from transformer.models.patterns import Pattern

LENGTH, HEADS, KV_HEADS, WIDTH = 33, 4, 2, 8
VALUE_WIDTH = {name: 2 * WIDTH if it.other_values else WIDTH for name, it in IMPLEMENTATIONS.items()}
XLA_ATTENTION = jax.nn.dot_product_attention
DOCS = Path(__file__).parents[2] / "docs" / "models.md"


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask, and what else is asked where the implementation takes it."""

    mask: Mask
    bias: str | None = None
    soft_cap: float = 0.0
    scale: float | None = None


def tokens() -> Tokens:
    """Rows: one text; several, of which some are a token long; padding before, between and after; nothing but padding."""
    rng = np.random.default_rng(0)
    segments = np.ones((4, LENGTH), np.int32)
    segments[1] = 1 + np.cumsum(rng.random(LENGTH) < 0.15)
    segments[2] = np.repeat([0, 1, 0, 2, 0], [3, 11, 2, 14, 3])
    segments[3] = 0
    column = np.broadcast_to(np.arange(LENGTH), segments.shape)
    starts = np.diff(segments, axis=1, prepend=-1) != 0
    positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    return Tokens(jnp.asarray(positions, jnp.int32), jnp.asarray(segments))


def cases() -> dict[str, Case]:
    whole = tokens()
    prefix = dataclasses.replace(whole, prefix=whole.positions < 4)
    # Six new tokens, and a cache whose columns are in no order.
    order = np.random.default_rng(1).permutation(LENGTH)
    held, new = jax.tree.map(lambda x: x[:, order], whole), whole.slice(21, 6)
    window, sinks = Pattern("window", window=5), Pattern("window", window=5, num_sinks=2)
    dilated = Pattern("dilated", window=3, dilation=2)
    blocks = Pattern("block_sparse", block=4, num_global=1, num_window=3, num_random=1)
    return {
        "causal": Case(Mask(whole, whole), soft_cap=2.0),
        "bidirectional": Case(Mask(whole, whole, causal=False), bias="relative"),
        "prefix": Case(Mask(prefix, prefix), bias="alibi"),
        "window": Case(Mask(whole, whole, sparsity=window), scale=0.7),
        "window, bidirectional": Case(Mask(whole, whole, causal=False, sparsity=window), soft_cap=2.0),
        "sinks": Case(Mask(whole, whole, sparsity=sinks), bias="relative", soft_cap=2.0),
        "dilated": Case(Mask(whole, whole, sparsity=dilated), bias="alibi"),
        "block_sparse": Case(Mask(whole, whole, sparsity=blocks)),
        "block_sparse, bidirectional": Case(Mask(whole, whole, causal=False, sparsity=blocks)),
        "unaligned": Case(Mask(new, held, aligned=False), bias="relative"),
    }


CASES = cases()


def asked(mask: Mask, **changes: Any) -> Asked:
    return Asked(**{"masks": kinds(mask), "head_widths": (64, 64), "dtype": "bfloat16", **changes})


def takes(name: str, case: Case) -> bool:
    return not list(IMPLEMENTATIONS[name].refusals(asked(case.mask)))


PAIRS = [(name, case) for name in IMPLEMENTATIONS for case in CASES if takes(name, CASES[case])]


def test_every_kind_of_mask_is_a_case() -> None:
    assert {kind for case in CASES.values() for kind in kinds(case.mask)} == set(MASKS)


def make_bias(name: str | None, causal: bool) -> Any:
    if name is None:
        return None
    if name == "alibi":
        return Alibi(jnp.asarray(alibi_slopes(HEADS)))
    table = np.random.default_rng(2).standard_normal((8, HEADS))
    return RelativeBuckets(jnp.asarray(table, jnp.float32), causal, 16)


def arrays(case: Case, dtype: str, value_width: int = WIDTH) -> list[jax.Array]:
    """Query, key, value, and the gradient of the output."""
    rng = np.random.default_rng(3)
    lengths = (case.mask.num_queries, case.mask.num_keys, case.mask.num_keys, case.mask.num_queries)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    widths = (WIDTH, WIDTH, value_width, value_width)
    shapes = [(4, length, count, width) for length, count, width in zip(lengths, heads, widths, strict=True)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@cache
def visible_pairs(label: str) -> np.ndarray:
    """Who sees whom, in NumPy."""
    mask = CASES[label].mask
    query, key = (np.asarray(mask.query.positions)[:, :, None], np.asarray(mask.key.positions)[:, None])
    segments = np.asarray(mask.query.segment_ids)[:, :, None]
    seen = (segments == np.asarray(mask.key.segment_ids)[:, None]) & (segments != 0)
    prefix: Any = 0 if mask.key.prefix is None else np.asarray(mask.key.prefix)[:, None]
    seen = seen & ((query >= key) | prefix) if mask.causal else seen
    return seen if mask.sparsity is None else seen & mask.sparsity.allows(query, key, mask.causal)  # pyright: ignore


@cache
def definition(label: str, dtype: str, value_width: int, is_biased: bool, soft_cap: float) -> list[np.ndarray]:
    """Output, and gradients of query, key, value and relative table, by hand in float64."""
    case = CASES[label]
    bias = make_bias(case.bias if is_biased else None, case.mask.causal)
    query, key, value, ahead = (np.asarray(x, np.float64) for x in arrays(case, dtype, value_width))
    group, scale = HEADS // KV_HEADS, WIDTH**-0.5 if case.scale is None else case.scale
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    visible = visible_pairs(label)[:, None]
    raw = scale * np.einsum("btnh,bsnh->bnts", query, key)
    bent = np.tanh(raw / soft_cap) if soft_cap else 0.0
    logits = soft_cap * bent if soft_cap else raw
    places = case.mask.query.positions, case.mask.key.positions
    logits = logits if bias is None else logits + np.asarray(bias(*places), np.float64)
    weights = np.where(visible, np.exp(logits - np.max(logits, axis=-1, keepdims=True)), 0)
    total = np.sum(weights, axis=-1, keepdims=True)
    weights = weights / np.where(total == 0, 1, total)
    to_weights = np.einsum("btnu,bsnu->bnts", ahead, value)
    to_logits = weights * (to_weights - np.sum(weights * to_weights, axis=-1, keepdims=True))
    to_raw = scale * to_logits * (1 - np.square(bent))
    of_groups = (4, case.mask.num_keys, KV_HEADS, group, -1)
    results = [
        np.einsum("bnts,bsnu->btnu", weights, value),
        np.einsum("bnts,bsnh->btnh", to_raw, key),
        np.einsum("bnts,btnh->bsnh", to_raw, query).reshape(of_groups).sum(axis=3),
        np.einsum("bnts,btnu->bsnu", weights, ahead).reshape(of_groups).sum(axis=3),
    ]
    if isinstance(bias, RelativeBuckets):
        buckets = np.asarray(bias.buckets(places[1][:, None, :] - places[0][:, :, None]))
        results.append(np.stack([np.sum(to_logits, axis=(0, 2, 3), where=buckets[:, None] == b) for b in range(8)]))
    return results


def options_for(name: str, case: Case) -> tuple[Any, float]:
    """Bias and soft cap of the case, where the implementation takes them."""
    implementation = IMPLEMENTATIONS[name]
    bias = make_bias(case.bias if implementation.bias else None, case.mask.causal)
    return bias, case.soft_cap if implementation.soft_cap else 0.0


def by_xla(*inputs: Any, implementation: str, **options: Any) -> jax.Array:
    """In the place of cuDNN's and tokamax's kernels, which need a GPU: what they are given, computed by XLA."""
    assert implementation in ("cudnn", "triton")
    return XLA_ATTENTION(*inputs, implementation="xla", **options)


@pytest.fixture(autouse=True)
def without_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, so that there are many; stand-ins for kernels that do not run here."""
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(blockwise, "SMALLEST", 8)
    monkeypatch.setattr(causal_blocks, "SMALLEST", 17)
    monkeypatch.setattr(causal_blocks, "MOST", 99)
    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(dot_product_attention=by_xla))


def function_of(name: str) -> Any:
    implementation = IMPLEMENTATIONS[name]
    function = getattr(sys.modules[implementation.module], implementation.function)
    return partial(function, interpret=True) if implementation.tested.startswith("interpreted") else function


@cache
def results(name: str, dtype: str, chosen: tuple[str, ...]) -> Any:
    """Output and gradients of several cases, compiled as one program."""

    def compute(inputs: Any) -> Any:
        found = {}
        for label, ((query, key, value, ahead), bias) in inputs.items():
            case, soft_cap = CASES[label], options_for(name, CASES[label])[1]

            def attention(*x: Any, case=case, soft_cap=soft_cap) -> jax.Array:
                return function_of(name)(*x[:3], case.mask, bias=x[3], scale=case.scale, soft_cap=soft_cap)

            output, backward = jax.vjp(attention, query, key, value, bias)
            found[label] = [output, *backward(ahead)]
        return found

    inputs = {
        label: (arrays(CASES[label], dtype, VALUE_WIDTH[name]), options_for(name, CASES[label])[0]) for label in chosen
    }
    return jax.jit(compute)(inputs)


def check(name: str, label: str, found: list[Any], dtype: str, tolerance: float) -> None:
    bias, soft_cap = options_for(name, CASES[label])
    *found, to_bias = found
    found += [to_bias.table] if isinstance(bias, RelativeBuckets) else []
    expected = definition(label, dtype, VALUE_WIDTH[name], bias is not None, soft_cap)
    names = ("output", "query", "key", "value", "relative table")
    for what, actual, wanted in zip(names, found, expected, strict=False):
        assert np.linalg.norm(np.asarray(actual, np.float64) - wanted) <= tolerance * np.linalg.norm(wanted), what
    # What sees nothing gets zero, what nobody sees no gradient: to the bit.
    visible = visible_pairs(label)
    blind, unseen = (np.logical_not(np.any(visible, axis=axis)) for axis in (2, 1))
    assert blind[3].all() and unseen[3].all() and unseen[2].any() and not blind[0].any()
    for what, actual, hidden in zip(names[:4], found[:4], (blind, blind, unseen, unseen), strict=True):
        assert not np.any(np.asarray(actual)[hidden]), what


@pytest.mark.parametrize(("name", "label"), PAIRS)
def test_each_implementation_is_the_definition(name: str, label: str) -> None:
    """Values and gradients, of queries that share keys, packed, padded, and blind, and of values wider than keys."""
    chosen = tuple(label for other, label in PAIRS if other == name)
    check(name, label, results(name, "float32", chosen)[label], "float32", 1e-5)


@pytest.mark.parametrize(
    ("name", "label"),
    [pytest.param(*pair, marks=pytest.mark.slow if pair[0] in ("blockwise", "splash") else ()) for pair in PAIRS],
)
def test_each_implementation_in_bfloat16(name: str, label: str) -> None:
    found = results(name, "bfloat16", tuple(label for other, label in PAIRS if other == name))[label]
    assert all(x.dtype == jnp.bfloat16 for x in found[:4])
    check(name, label, found, "bfloat16", 2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_block_of_all_queries(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As short texts have it: XLA's CPU backend takes other ways for small products."""
    monkeypatch.setattr(causal_blocks, "SMALLEST", 64)
    found = results.__wrapped__("causal_blocks", dtype, ("causal",))["causal"]
    check("causal_blocks", "causal", found, dtype, {"float32": 1e-5, "bfloat16": 2e-2}[dtype])


def mask_of(length: int, **changes: Any) -> Mask:
    places = jnp.zeros((1, length), jnp.int32)
    return Mask(Tokens(places, places), Tokens(places, places), **changes)


def compiled_memory(function: Any, length: int) -> int:
    """Bytes of temporaries of value and gradient."""
    places = jax.ShapeDtypeStruct((1, length), jnp.int32)
    query, key = (jax.ShapeDtypeStruct((1, length, heads, 256), jnp.float32) for heads in (2, 1))

    def loss(query: Any, key: Any, value: Any, places: Any) -> Any:
        tokens = Tokens(places, places)
        return jnp.sum(function(query, key, value, Mask(tokens, tokens)) ** 2)

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(query, key, key, places).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes


def test_memory_of_blocks_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of compiled programs that are never run; that of all pairs at once is quadratic."""
    monkeypatch.undo()
    lengths = [1024, 4096, 16_384]
    slopes = {}
    for name, function in (("blockwise", blockwise.blockwise_attention), ("reference", dot_product_attention)):
        sizes = [compiled_memory(function, length) for length in lengths]
        slopes[name] = np.polyfit(np.log(lengths), np.log(sizes), 1)[0]
        print(f"{name}: {', '.join(f'{size / 2**20:.1f} MiB' for size in sizes)}, slope {slopes[name]:.3f}")
    assert 0.9 < slopes["blockwise"] < 1.05
    assert slopes["reference"] > 1.75


ASKING: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("objective.name = 'prefix_lm'", {"objective": {"name": "prefix_lm"}}),
    "window": ("model.layers = 'attention+attention.window'", {"layers": "attention+attention.window"}),
    "sinks": ("model.num_sinks = 2", {"layers": "attention.window", "num_sinks": 2}),
    "dilated": ("model.layers = 'attention.dilated'", {"layers": "attention.dilated"}),
    "block_sparse": ("model.layers = 'attention.block_sparse'", {"layers": "attention.block_sparse"}),
    "unaligned": ("evaluation.sample_tokens = 9", {"evaluation": {"sample_tokens": 9}}),
    "bias": ("model.positions = 'alibi'", {"positions": "alibi"}),
    "soft_cap": ("model.attention_soft_cap = 30.0", {"attention_soft_cap": 30.0}),
    "dtype": ("model.compute_dtype = 'float32'", {"compute_dtype": "float32"}),
    "head_widths": ("model.head_width = 12", {"head_width": 12}),
}
"""What a configuration can ask for: the key that does, as it is named, and the change."""


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_configuration_asks_for_no_more_than_is_taken(name: str) -> None:
    implementation = IMPLEMENTATIONS[name]
    base = replace(Config(), model={"attention_implementation": name, "compute_dtype": "bfloat16", "head_width": 64})
    base = replace(base, evaluation={"sample_tokens": 0})
    assert problems_of(base) == []
    for what, (asking, changes) in ASKING.items():
        sections = {section: changes.pop(section) for section in ("objective", "evaluation") if section in changes}
        problems = problems_of(replace(base, model=changes, **sections))
        changes |= sections
        least = {"bias": implementation.bias, "soft_cap": implementation.soft_cap}
        least |= {"dtype": "float32" in implementation.dtypes, "head_widths": implementation.head_multiple == 1}
        is_taken = least.get(what, what in implementation.masks)
        expected = f"{asking}: model.attention_implementation = {name!r} "
        assert problems == [] if is_taken else [p for p in problems if p.startswith(expected)], (what, problems)
    latent = replace(base, model={"layers": "latent_attention", "rotary_head_width": 32})
    refused = "model.rotary_head_width = 32: " if not implementation.other_values else ""
    assert all(p.startswith(refused) for p in problems_of(latent)) and bool(problems_of(latent)) == bool(refused)
    decoder_and_encoder = replace(
        base, model={"architecture": "encoder_decoder"}, objective={"name": "span_corruption"}
    )
    assert bool(problems_of(decoder_and_encoder)) == ("unaligned" not in implementation.masks)
    elsewhere = problems_of(base, next(iter({"cpu", "gpu", "tpu"} - set(implementation.platforms)), None))
    assert bool(elsewhere) == (len(implementation.platforms) < 3)
    assert all(f"model.attention_implementation = {name!r} runs on" in problem for problem in elsewhere)


def test_mistakes_of_their_own_are_reported_alone() -> None:
    broken = replace(Config(), model={"attention_implementation": "splash", "num_heads": 0, "layers": "?"})
    assert not any("splash" in problem for problem in problems_of(broken))


def shaped(case: Case, dtype: Any = jnp.float32) -> list[Any]:
    return [jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays(case, "float32")[:3]]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_what_is_named_refuses_while_it_is_traced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = IMPLEMENTATIONS[name]
    monkeypatch.setattr(jax, "default_backend", lambda: implementation.platforms[0])
    for case in CASES.values():
        inputs = shaped(case, implementation.dtypes[0])
        run = partial(jax.eval_shape, partial(attend, name, mask=case.mask), *inputs)
        if not takes(name, case):
            with pytest.raises(ConfigError, match=f"model.attention_implementation = '{name}' takes"):
                run()
        elif name != "splash":  # which looks for a TPU already here
            assert run().shape == inputs[0].shape
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    with pytest.raises(ConfigError, match="and this is another"):
        jax.eval_shape(partial(attend, name, mask=CASES["causal"].mask), *shaped(CASES["causal"]))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ConfigError, match="'tokamax' needs the package tokamax"):
        jax.eval_shape(partial(kernels.tokamax, mask=CASES["causal"].mask), *shaped(CASES["causal"]))


@pytest.mark.parametrize(
    ("platform", "mask", "changes", "chosen", "reason"),
    [
        ("cpu", mask_of(1024), {}, "causal_blocks", None),
        ("cpu", mask_of(1032), {}, "blockwise", None),
        ("cpu", mask_of(1024, causal=False), {}, "reference", None),
        ("cpu", mask_of(2048, causal=False), {}, "blockwise", None),
        ("tpu", mask_of(8192), {}, "splash", None),
        ("tpu", mask_of(8192), {"has_bias": True}, "blockwise", "splash adds no bias"),
        ("tpu", mask_of(512), {"head_widths": (12, 12)}, "reference", "splash takes widths of heads"),
        ("tpu", mask_of(512), {"head_widths": (96, 64)}, "splash", None),
        (
            "gpu",
            mask_of(512),
            {"head_widths": (96, 64), "dtype": "bfloat16"},
            "reference",
            "96 for keys and 64 for values",
        ),
        ("tpu", mask_of(2048, aligned=False), {}, "blockwise", "not of a cache"),
        ("tpu", mask_of(2048, sparsity=Pattern("dilated", 3, 0, 2)), {}, "blockwise", "not dilated"),
        ("gpu", mask_of(2048), {"dtype": "bfloat16"}, "cudnn", None),
        ("gpu", mask_of(2048), {}, "blockwise", "cudnn computes in bfloat16, not float32"),
        ("gpu", mask_of(512), {"dtype": "bfloat16", "has_soft_cap": True}, "reference", "cudnn does not bend"),
        ("gpu", mask_of(16_384), {"dtype": "bfloat16"}, "blockwise", "the mask in full, here of 16,384"),
    ],
)
def test_auto_chooses_by_platform_length_and_mask(
    platform: str, mask: Mask, changes: dict[str, Any], chosen: str, reason: str | None, caplog: Any
) -> None:
    """And says once why not the kernel of the platform."""
    dot_product._tell.cache_clear()
    wanted = asked(mask, **{"dtype": "float32", "platform": platform, **changes})
    with caplog.at_level(logging.WARNING):
        assert [dot_product._choose(wanted, mask) for _ in range(2)] == [chosen, chosen]
    assert len(caplog.messages) == (reason is not None)
    assert reason is None or (reason in caplog.text and f"computed by {chosen}: " in caplog.text)


@pytest.mark.parametrize("tensor", [2, 4])
def test_kernels_run_on_each_devices_rows_and_heads(tensor: int) -> None:
    """Also where there are fewer key heads than devices to split the query heads."""
    case = CASES["window"]
    query, key, value, _ = arrays(case, "float32")
    mesh = jax.make_mesh((8 // tensor, tensor), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        program = jax.jit(partial(kernels.cudnn, mask=case.mask))
        compiled = program.lower(query, key, value).compile()
        output = compiled(query, key, value)
    alone = dot_product_attention(query, key, value, case.mask)
    assert np.linalg.norm(output - alone) <= 1e-5 * np.linalg.norm(alone)
    assert f"f32[{4 * tensor // 8},{LENGTH + 1},{HEADS // tensor},{WIDTH}]" in str(compiled.as_text())


def test_cudnn_is_lowered_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as this goes without one: JAX checks shapes and types, and writes cuDNN's calls."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.setattr(jax.nn, "dot_product_attention", XLA_ATTENTION)
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    for label in ("window", "unaligned"):
        mask = CASES[label].mask

        def loss(query: Any, key: Any, value: Any, mask: Mask = mask) -> Any:
            return jnp.sum(kernels.cudnn(query, key, value, mask).astype(jnp.float32))

        traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*shaped(CASES[label], jnp.bfloat16))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "__cudnn$fmhaScaleBias" in text and "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def test_splash_compiles_for_a_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its compiler is installed; wide and narrow heads, packed, with a window, over four chips."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    pytest.importorskip("libtpu", reason="the compiler for TPUs is not installed")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    places = jax.ShapeDtypeStruct((4, 300), jnp.int32, sharding=rows)
    for width, dtype in ((24, jnp.bfloat16), (256, jnp.float32)):
        inputs = [jax.ShapeDtypeStruct((4, 300, heads, width), dtype, sharding=rows) for heads in (4, 2, 2)]

        def loss(query: Any, key: Any, value: Any, places: Any) -> Any:
            tokens = Tokens(places, places)
            mask = Mask(tokens, tokens, sparsity=Pattern("window", window=100))
            return jnp.sum(attend("auto", query, key, value, mask, soft_cap=30.0).astype(jnp.float32))

        # The suite's own precision is not one that the compiler has for products in bfloat16.
        with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
            compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*inputs, places).compile()
        assert str(compiled.as_text()).count('custom_call_target="tpu_custom_call"') >= 3


H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  device_memory_size: 84942979072
  memory_bandwidth: 3352320000000
  clock_rate_ghz: 1.98
  device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""What XLA's compiler has to know of a chip that is not here."""


def compiled_for_h100s(name: str, length: int, width: int) -> str:
    """The program of gradients for four of them: packed and causal, in bfloat16, two query heads to a key head."""
    if not any("cuda" in plugin.value for plugin in entry_points(group="jax_plugins")):
        pytest.skip("the compiler for GPUs is not installed")
    from jax._src.config import persistent_cache_min_compile_time_secs
    from jax.experimental import topologies

    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x4")
    devices = np.asarray(topology.devices).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    places = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=rows)
    inputs = [jax.ShapeDtypeStruct((4, length, heads, width), jnp.bfloat16, sharding=rows) for heads in (8, 4, 4)]

    def loss(query: Any, key: Any, value: Any, positions: Any, segment_ids: Any) -> Any:
        tokens = Tokens(positions, segment_ids)
        return jnp.sum(attend(name, query, key, value, Mask(tokens, tokens)).astype(jnp.float32))

    with jax.set_mesh(mesh), jax.default_matmul_precision("default"):
        lowered = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*inputs, places, places)
        # JAX would keep the program, and could not read it back without a GPU.
        with persistent_cache_min_compile_time_secs(float("inf")):
            return str(lowered.compile().as_text())


@pytest.mark.parametrize(("length", "width"), [(300, 24), (512, 128)])
def test_cudnn_compiles_for_an_h100(length: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where XLA's compiler for GPUs is installed. cuDNN itself plans its kernels where there is a GPU, and not before."""
    from jax._src.cudnn import fused_attention_stablehlo as fused

    monkeypatch.undo()
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91_000)
    text = compiled_for_h100s("auto", length, width)
    assert f"bf16[2,{length},4,{width}]" in text
    for target in ("__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"):
        assert f'custom_call_target="{target}"' in text


@pytest.mark.parametrize(("length", "width"), [(300, 24), (512, 128)])
def test_tokamax_compiles_for_an_h100(length: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it and XLA's compiler for GPUs are installed: its kernels in Triton, to the end, both ways."""
    monkeypatch.undo()
    tokamax = pytest.importorskip("tokamax", reason="tokamax is not installed")
    # Otherwise it asks whether the device that is here has Triton.
    with tokamax.config.cross_compile(True):
        text = compiled_for_h100s("tokamax", length, width)
    assert f"bf16[2,{length},4,{width}]" in text
    assert text.count('custom_call_target="__gpu$xla.gpu.triton"') >= 2
    for kernel in ("pallas_flash_attention_fwd_res", "pallas_flash_attention_vjp"):
        assert kernel in text


def test_names_are_those_of_the_key() -> None:
    assert set(get_args(get_type_hints(ModelConfig)["attention_implementation"])) == {"auto", *IMPLEMENTATIONS}


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", "stdlib", "--model.positions", "alibi", "--model.attention_implementation", "blockwise"]
    assert implementations(parse(ImplementationsOptions, flags, "transformer implementations")) == 0
    printed = capsys.readouterr().out
    table, _, rest = printed.partition("\n\n")
    assert table.count("\n") == len(IMPLEMENTATIONS) + 1
    assert table in DOCS.read_text()
    assert "blockwise: yes" in rest and "cudnn: no, model.positions = 'alibi'" in rest

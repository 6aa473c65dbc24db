"""Arithmetic: chips and topologies, the roofline, what is estimated without a compiler, and the messages about mistakes."""

import dataclasses
import json
import types
from collections.abc import Callable
from typing import Any

import pytest

from transformer.cli import run
from transformer.config import Config, ConfigError, replace
from transformer.parallel import torus
from transformer.plans import arithmetic, command, compilation, report, roofline, search
from transformer.plans.chips import CHIPS, parse_topology, shapes
from transformer.plans.collectives import Collective
from transformer.plans.compilation import Compiled, Memory, extrapolated, out_of_memory
from transformer.plans.roofline import num_links


@pytest.fixture
def config(tiny_config: Callable[..., Config]) -> Config:
    model = {"vocab_size": 512, "num_layers": 4, "compute_dtype": "bfloat16"}
    return replace(tiny_config(), model=model, train={"batch_size": 64, "num_microbatches": 1}, parallel={"fsdp": -1})


def collective(kind: str = "all-gather", **changes: Any) -> Collective:
    base = Collective(kind, ("fsdp",), 4, 4_000_000, 10, False, False, (0, 1, 2, 3), "mixer/dot_general")
    return dataclasses.replace(base, **changes)


def compiled(config: Config, *collectives: Collective, slices: int = 1, **memory: int) -> Compiled:
    topology = parse_topology("v5e:2x2", slices)
    places = [(s, x, y, 0) for s in range(slices) for x in range(2) for y in range(2)]
    axes = {"replica": slices, "stage": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    sizes: dict[str, Any] = {"parameters": 10**9, "optimizer_state": 2 * 10**9, "batch": 0, **memory}
    held = Memory(**sizes)
    return Compiled(config, topology, axes, held, True, 16 * 2**30, places, list(collectives))


@pytest.mark.parametrize(
    "text", ["v5e:16x16", "v5p:8x8x8", "v5p:2x2x1", "v5p:16x16x24", "v6e:2x4", "v4:4x4x8", "h100:8x8"]
)
def test_topologies_that_exist(text: str) -> None:
    topology = parse_topology(text, 2)
    assert topology.name == text and topology.num_chips % 8 == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5x:8x8x8", "chips are v4, v5e, v5p, v6e, h100 (did you mean v5"),
        ("v5p:8x8", "must be v5p: and 3 numbers"),
        ("v5e:17x16", "did you mean v5e:16x16?"),
        ("v5p:8x8x9", "did you mean v5p:8x8x8?"),
        ("v6e:32x32", "did you mean v6e:16x16?"),
        ("v5e:axb", "must be v5e: and 2 numbers"),
        ("v5p", "must be v5p: and 3 numbers"),
    ],
)
def test_topologies_that_do_not(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="--topology") as error:
        parse_topology(text)
    assert message in str(error.value)


def test_every_shape_of_a_torus_fits_into_the_pod() -> None:
    largest = {
        name: max(shapes(CHIPS[name]), key=lambda shape: (shape[0] * shape[1], shape)) for name in ("v5e", "v6e")
    }
    assert largest == {"v5e": (16, 16), "v6e": (16, 16)}
    assert (16, 16, 24) in shapes(CHIPS["v5p"]) and (16, 24, 24) not in shapes(CHIPS["v5p"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing"),
        (["--topology", "v5p:9x9x9"], "did you mean"),
        (["--topology", "v5e:2x2", "--slices", "0"], "--slices = 0"),
        (["--topology", "v5e:2x2", "--periods", "4", "2"], "--periods"),
        (["--topology", "v5e:2x2", "--candidates", "0"], "--candidates"),
        (["--topology", "v5e:4x4", "--parallel.fsdp", "8"], "does not match"),
        (["--topology", "v5e:4x4", "--compare", "fdsp=4"], "did you mean fsdp?"),
        (["--topology", "v5e:4x4", "--search", "--axes", "fdsp"], "did you mean fsdp?"),
        (["--topology", "v5e:4x4", "--slices", "2", "--search", "--axes", "fsdp"], "must have replica"),
    ],
)
def test_mistakes_are_told_before_anything_is_compiled(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(["plan", "--config", "stdlib", *arguments])
    assert message in str(error.value)


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[tpu\]'"):
        compilation.prepare(CHIPS["v5e"], config)


def test_links_of_a_group() -> None:
    v5e, v5p = CHIPS["v5e"], CHIPS["v5p"]
    row, square = [(x, 0, 0) for x in range(16)], [(x, y, 0) for x in range(16) for y in range(16)]
    assert num_links(v5e, (16, 16), row) == 2 and num_links(v5e, (16, 16), square) == 4
    assert num_links(v5e, (8, 8), row[:8]) == 1, "half a row of the pod is no ring"
    cube = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    assert num_links(v5p, (4, 4, 4), cube) == 6 and num_links(v5p, (4, 4, 8), cube) == 5
    assert num_links(CHIPS["h100"], (8, 8), cube) == 1


def test_the_roofline(config: Config) -> None:
    """Each part of the sum by hand."""
    open_gather = collective()
    hidden = collective(overlapped=True, count=5)
    plan = compiled(config, open_gather, hidden)
    found = roofline.predict(plan)
    # A gather of 4 MB over 4 chips that stand in a square: 3 MB, over two links of 45 GB/s.
    one = 3e6 / (2 * 4.5e10)
    assert found.exposed_ici == pytest.approx(10 * one) and found.hidden == pytest.approx(5 * one)
    assert found.exposed_dcn == 0
    state = 2 * (10**9 + 2 * 10**9 + 15 * 4_000_000)
    assert found.memory == pytest.approx(state / 8.19e11)
    assert found.products == pytest.approx(found.executed_flops / (4 * 197e12) / roofline.EFFICIENCY)
    assert found.step_seconds == pytest.approx(max(found.products, found.memory) + 10 * one)
    assert found.mfu == pytest.approx(found.step_flops / (4 * 197e12) / found.step_seconds)
    tokens = 64 * config.data.sequence_length
    assert found.tokens_per_day == pytest.approx(tokens * 86_400 / found.step_seconds)
    assert roofline.chip_hours(found.tokens_per_day, found, plan.topology) == pytest.approx(24 * 4)


def test_a_transfer_between_slices_takes_the_network(config: Config) -> None:
    gradient = collective("all-reduce", axes=("replica",), group_size=2, group=(0, 4), crosses_slices=True, count=1)
    found = roofline.predict(compiled(config, gradient, slices=2))
    assert found.exposed_dcn == pytest.approx(4e6 / 3.125e9) and found.exposed_ici == 0


def test_what_is_hidden_and_longer_than_the_work_counts(config: Config) -> None:
    found = roofline.predict(compiled(config, collective(overlapped=True, count=10**6)))
    assert found.step_seconds == pytest.approx(found.hidden)


def test_two_depths_tell_the_whole(config: Config) -> None:
    def at(depth: int) -> Compiled:
        small = replace(config, model={"num_layers": depth})
        return compiled(small, collective(count=depth), collective("all-reduce", count=1), other=100 + 10 * depth)

    whole = extrapolated(at(1), at(2), (1, 2), config)
    assert whole.memory.other == 140 and whole.memory.parameters == 10**9
    assert [item.count for item in whole.collectives] == [4, 1]
    assert whole.config.model.num_layers == 4


def test_messages_of_programs_that_are_too_large() -> None:
    now = out_of_memory(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (36.69G) exceeds available HBM (15.75G). HLO module: jit_train_step."
    )
    assert now is not None and not now.is_all
    assert (now.used, now.limit) == (round(36.69 * 2**30), round(15.75 * 2**30))
    before = out_of_memory(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.10G of 15.75G "
        "hbm. Exceeded hbm capacity by 4.35G.\n\nLargest program allocations in hbm:\n\n"
        '  1. Size: 8.00G\n     Operator: op_name="jit(step)/dot"\n     Shape: bf16[64,1024]{1,0}\n     ===========\n'
    )
    assert before is not None and before.is_all and before.used == round(20.10 * 2**30)
    assert before.largest == ("8.00G: bf16[64,1024]{1,0} jit(step)/dot",)
    assert out_of_memory("INTERNAL: something else") is None


def test_estimates_fall_as_the_model_is_split(config: Config) -> None:
    topology = parse_topology("v5e:4x4")
    one = arithmetic.estimate(replace(config, parallel={"fsdp": 16}), topology)
    copies = arithmetic.estimate(replace(config, parallel={"fsdp": 1, "replica": 16}), topology)
    assert copies.parameters > 8 * one.parameters and copies.optimizer_state == 2 * copies.parameters
    full, none = (
        arithmetic.estimate(replace(config, parallel={"fsdp": 16}, model={"remat": remat}), topology)
        for remat in ("full", "none")
    )
    assert full.activations < none.activations and full.seconds.products > none.seconds.products
    assert set(one.transfers) == {"fsdp"} and set(copies.transfers) == {"replica"}


def test_changes_that_make_a_plan_fit_are_what_train_accepts(config: Config) -> None:
    changes = arithmetic.changes_that_help(
        replace(config, parallel={"fsdp": 8, "tensor": 2}), parse_topology("v5e:4x4")
    )
    assert len(changes) == 3 and all(change.saved > 0 for change in changes)
    assert changes == sorted(changes, key=lambda change: -change.saved)
    assert all(change.text.startswith("--") for change in changes)


def test_a_search_ranks_what_it_compiles_and_says_why_others_lost(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    topology = parse_topology("v5e:2x2")

    def compile_for(config: Config, topology: Any, num_periods: int | None = None) -> Compiled:
        return dataclasses.replace(compiled(config), axes={**compiled(config).axes})

    monkeypatch.setattr(search, "compile_for", compile_for)
    found = search.search(config, topology, 2, axes=("fsdp", "tensor"))
    assert len(found.ranked) == 2
    assert [i.prediction.step_seconds for i in found.ranked if i.prediction] == sorted(
        i.prediction.step_seconds for i in found.ranked if i.prediction
    )
    total = len(list(search.settings(config, topology, ("fsdp", "tensor"))))
    assert len(found.ranked) + len(found.lost) + found.refused.total() == total
    assert all(item.verdict for item in found.lost)
    text = report.search_text(found, topology)
    assert "best: --parallel.fsdp" in text and "by arithmetic" in text


def test_a_search_learns_which_transfers_stay_in_the_open(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compiler that leaves three times fsdp's transfers in the open, where arithmetic hides them all."""
    topology, truth = parse_topology("v5e:4x4"), {"fsdp": [3.0]}
    config = replace(config, model={"width": 1024, "num_heads": 16}, data={"sequence_length": 512})

    def of(found: Compiled) -> arithmetic.Estimate:
        return arithmetic.estimate(found.config, topology)

    def predict(found: Compiled) -> roofline.Prediction:
        open_ones = {axis: seconds * (3 if axis == "fsdp" else 1) for axis, seconds in of(found).transfers.items()}
        return dataclasses.replace(of(found).seconds, exposed_ici=sum(open_ones.values()), hidden=0.0)

    def open_seconds(found: Compiled) -> dict[str, float]:
        return {axis: seconds * (3 if axis == "fsdp" else 1) for axis, seconds in of(found).transfers.items()}

    monkeypatch.setattr(search, "compile_for", lambda config, *_: dataclasses.replace(compiled(config), config=config))
    monkeypatch.setattr(search, "predict", predict)
    monkeypatch.setattr(search, "open_seconds", open_seconds)
    axes = ("fsdp", "tensor")
    first, few, whole = (search.search(config, topology, count, axes).ranked for count in (1, 5, 1000))
    assert few[0].estimate.config == whole[0].estimate.config != first[0].estimate.config
    best = few[0].compiled
    assert best is not None
    assert search.expected_seconds(few[0].estimate, truth) == pytest.approx(predict(best).step_seconds)


def test_settings_divide_and_keep_slices_apart(config: Config) -> None:
    for found in search.settings(config, parse_topology("v5e:2x2", 2)):
        assert found.parallel.replica % 2 == 0 and found.train.batch_size % found.train.num_microbatches == 0


def test_the_report_tells_everything(config: Config) -> None:
    scalar = collective("all-reduce", bytes=4, count=2)
    text = report.text_of(compiled(config, collective(), scalar, gradients=5 * 10**8), tokens=1e12)
    for part in ("v5e:2x2, 4 chips", "| gradients of the layers | 0.5 |", "| all-gather | fsdp | ICI | 4 | 10 |"):
        assert part in text
    assert "all-reduce of scalars" in text and "MFU" in text and "chip-hours" in text
    json.dumps(report.record_of(compiled(config, collective()), 1e12))


def test_the_report_of_what_does_not_fit(config: Config) -> None:
    plan = dataclasses.replace(compiled(config, other=40 * 10**9), fits=False, topology=parse_topology("v5e:2x2"))
    text = report.text_of(plan)
    assert "Does not fit, by 25.82 GB: other temporaries 40.00 GB" in text
    assert text.count("GB less") == 3


def test_arithmetic_alone_plans_for_chips_without_a_compiler(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--topology", "h100:64x8", "--arithmetic", "--parallel.tensor", "8", "--train.num-microbatches", "8"]
    assert run(["plan", "--config", "llama3_70b", *flags, "--tokens", "15e12"]) == 0
    printed = capsys.readouterr().out
    assert "h100:64x8, 512 chips; fsdp 64 x tensor 8; by arithmetic alone" in printed and "chip-hours" in printed
    # 4 bytes of each of 70.6 billion parameters and 8 of their moments, over 512 chips, and the norms, which are not split.
    assert "| parameters | 0.55" in printed and "| optimizer state | 1.11" in printed


def test_side_by_side(config: Config) -> None:
    records = [report.record_of(compiled(config, collective(count=n))) for n in (1, 2)]
    text = report.compared(records)
    assert "| 1 x v5e:2x2 | 1 x v5e:2x2 |" in text and "| sent over ICI, GB | 0.003 | 0.006 |" in text
    changed, options = report.split_config(config, "v6e:16x16,slices=2,fsdp=64,tensor=4,remat=full,microbatches=2")
    assert options == {"topology": "v6e:16x16", "slices": "2"}
    assert (changed.parallel.fsdp, changed.parallel.tensor, changed.train.num_microbatches) == (64, 4, 2)
    assert changed.model.remat == "full"


def test_a_replica_for_each_slice(config: Config) -> None:
    assert command.on_slices(config, parse_topology("v5e:2x2", 4)).parallel.replica == 4
    assert command.on_slices(config, parse_topology("v5e:2x2")).parallel.replica == 1


@pytest.mark.parametrize("replicas", [2, 4])
def test_slices_are_apart_in_the_first_axis(replicas: int) -> None:
    """Whatever the order in which the runtime lists them."""
    devices = [
        types.SimpleNamespace(
            id=4 * s + 2 * y + x,
            process_index=s,
            slice_index=s,
            coords=(x, y, 0),
            core_on_chip=0,
            platform="tpu",
            device_kind="TPU v5 lite",
        )
        for x in range(2)
        for s in range(2)
        for y in range(2)
    ]
    grid = torus.arranged((replicas, 1, 8 // replicas, 1, 1, 1), devices)
    assert [{d.slice_index for d in row.flat} for row in grid] == [{n * 2 // replicas} for n in range(replicas)]
    with pytest.raises(ConfigError, match="multiple of the 2 slices"):
        torus.arranged((1, 1, 8, 1, 1, 1), devices)

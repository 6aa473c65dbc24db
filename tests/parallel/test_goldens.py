"""Layouts and collectives of recipes, as files that a change shows in: `make goldens` writes them anew.

Each recipe keeps its widths and has two periods of layers. Arrays are laid out without a device; the collectives are those of
the step compiled for eight simulated ones, which depend on the release of XLA that the file names.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.arguments import load_config
from transformer.checkpointing.run import resolve
from transformer.config import MESH_AXES, Config, replace
from transformer.models.parameters import is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of, vocabulary, with_window
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import batch_sharding, make_mesh, use_rules
from transformer.training.state import abstract_state, state_shardings
from transformer.training.step import compile_step, make_train_step

GOLDENS = Path(__file__).parent.parent / "goldens"
REWRITES = "REWRITE_GOLDENS" in os.environ
LENGTH, ROWS = 128, 8

PAIRS = (
    ("gpt2_124m", "fsdp=8"),
    ("gpt2_124m", "replica=2 tensor=4"),
    ("llama_1b", "fsdp=8"),
    ("llama_1b", "fsdp=2 tensor=4 sequence_sharding"),
    ("llama_1b", "replica=4 fsdp=2 shard_optimizer"),
    ("llama_1b", "replica=2 fsdp=2 tensor=2"),
    ("moe_8x", "fsdp=2 expert=4"),
    ("moe_8x", "fsdp=2 expert=2 tensor=2"),
    ("hybrid_1b", "fsdp=4 tensor=2"),
    ("bert_base", "replica=8"),
    ("t5_base", "fsdp=4 tensor=2"),
    ("aiayn_base", "replica=2 fsdp=2 tensor=2"),
)
NAMES = ["-".join([recipe, *split.replace("=", "").split()]) for recipe, split in PAIRS]
each_pair = pytest.mark.parametrize(
    ("name", "recipe", "split"), [(name, *pair) for name, pair in zip(NAMES, PAIRS, strict=True)], ids=NAMES
)


def config_of(recipe: str, split: str) -> Config:
    """Returns a recipe with two periods of layers, short texts and a small batch."""
    words = [word.partition("=") for word in split.split()]
    parallel: dict[str, Any] = dict.fromkeys(MESH_AXES, 1) | {name: int(size or 1) for name, _, size in words}
    config, _, _ = load_config(recipe)
    periods = {"num_layers": 2 * len(config.model.kinds)}
    if config.model.architecture == "encoder_decoder":
        periods["num_encoder_layers"] = 2 * len(config.model.encoder_kinds)
    config = replace(
        config,
        data={"sequence_length": LENGTH, "source_length": None, "window_length": None},
        model={**periods, "scan_layers": True, "attention_implementation": "auto", "remat": "none"},
        train={"batch_size": ROWS, "num_microbatches": 1, "batch_warmup_steps": 0},
        optimizer={"warmup_steps": 0, "warmup_tokens": 0},
        evaluation={"batch_size": None},
        parallel=parallel,
    )
    return resolve(with_window(config), vocabulary.without_data(config))


def arrays(config: Config) -> Iterator[str]:
    """Yields a line a parameter: its shape, the names of its dimensions, and the axes over which each is split."""
    sizes = {axis: getattr(config.parallel, axis) for axis in MESH_AXES}
    model = Transformer(config.model)
    specs = parameter_specs(model)
    optimizer = make_optimizer(config, specs)
    with use_rules(config):
        mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
        state = state_shardings(model, optimizer, mesh, config.parallel)
    yield "# parameter | shape | names | split over | shape on a device"
    layouts = jax.tree.leaves(state.params)
    for (path, spec), layout in zip(jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec), layouts, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        here = layout.shard_shape(spec.shape)
        yield f"{name} | {_dims(spec.shape)} | {', '.join(spec.axes)} | {_split(layout)} | {_dims(here)}"
    if config.parallel.shard_optimizer:
        yield "# moments | split over"
        for path, layout in jax.tree_util.tree_leaves_with_path(state.opt_state):
            if layout.spec:
                yield f"{jax.tree_util.keystr(path, simple=True, separator='/')} | {_split(layout)}"


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _split(layout: Any) -> str:
    return ", ".join(e if isinstance(e, str) else "+".join(e) if e else "-" for e in layout.spec)


def collectives(config: Config) -> Iterator[str]:
    """Yields a line for each kind of collective and axes of the compiled step, with their number in and outside loops."""
    sizes = {axis: getattr(config.parallel, axis) for axis in MESH_AXES}
    mesh = make_mesh(config)
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    with jax.set_mesh(mesh), use_rules(config):
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
        state = abstract_state(model, optimizer, shardings)
        batch = {
            name: jax.ShapeDtypeStruct((ROWS, length), dtype, sharding=batch_sharding(mesh))
            for name, (length, dtype) in objective_of(config).arrays(config).items()
        }
        step = make_train_step(config, model, optimizer, shardings)
        program = compile_step(step, state, batch, shardings, mesh)
    yield f"# collective | axes | in loops | outside (jax {jax.__version__}, simulated devices)"
    counts: dict[tuple[str, str], Counter[bool]] = {}
    for kind, groups, in_loop in found(program.as_text()):
        counts.setdefault((kind, axes_of(groups, tuple(sizes.values()))), Counter())[in_loop] += 1
    for (kind, axes), count in sorted(counts.items()):
        yield f"{kind} | {axes} | {count[True]} | {count[False]}"


KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute"


def found(program: str) -> Iterator[tuple[str, list[list[int]], bool]]:
    """Yields the collectives of a compiled program: kind, groups of devices, and whether it is in the body of a loop."""
    in_loop = False
    for line in program.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            in_loop = not line.startswith("ENTRY")
        elif match := re.search(rf" ({KINDS})(?:-start)?\(", line):
            yield match[1], groups_in(line), in_loop


def groups_in(line: str) -> list[list[int]]:
    """Returns the groups of an instruction, in any of the three ways that XLA writes them."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(n) for n in re.findall(r"\d+", pair)] for pair in pairs[1].split("},")]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(n) for n in re.findall(r"\d+", group)] for group in listed[1].split("},")]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in iota[number].split(",")] for number in (1, 2))
        numbers = np.arange(math.prod(dims)).reshape(dims)
        order = [int(n) for n in iota[3].split(",")] if iota[3] else range(len(dims))
        return numbers.transpose(order).reshape(shape).tolist()
    named = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", line
    )
    assert named, line
    dims = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    numbers = np.arange(math.prod(dims.values()))
    if named[2]:
        order = [int(n) for n in named[3].split(",")] if named[3] else range(named[2].count(",") + 1)
        numbers = numbers.reshape([int(n) for n in named[2].split(",")]).transpose(order)
    over = [list(dims).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    numbers = np.moveaxis(numbers.reshape(tuple(dims.values())), over, range(-len(over), 0))
    return numbers.reshape(-1, math.prod(list(dims.values())[axis] for axis in over)).tolist()


def axes_of(groups: list[list[int]], shape: tuple[int, ...]) -> str:
    """Returns the axes of the mesh along which the devices of a group differ."""
    places = [np.unravel_index(group, shape) for group in groups]
    over = [axis for number, axis in enumerate(MESH_AXES) if any(np.ptp(place[number]) for place in places)]
    return ", ".join(over) or "-"


def compare(name: str, part: str, lines: Iterator[str]) -> None:
    path, text = GOLDENS / f"{name}.{part}.txt", "".join(f"{line}\n" for line in lines)
    if REWRITES:
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines(), "if it is meant: `make goldens`"


@each_pair
def test_arrays_lie_where_they_lay(name: str, recipe: str, split: str) -> None:
    compare(name, "arrays", arrays(config_of(recipe, split)))


@pytest.mark.slow
@each_pair
def test_collectives_are_what_they_were(name: str, recipe: str, split: str) -> None:
    path = GOLDENS / f"{name}.collectives.txt"
    if not REWRITES and f"(jax {jax.__version__}," not in path.read_text():
        pytest.skip(f"{path.name} is of another release of JAX")
    compare(name, "collectives", collectives(config_of(recipe, split)))


@pytest.mark.parametrize(
    ("written", "axes"),
    [
        ("replica_groups=[4,2]<=[8]", "tensor"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", "fsdp, expert"),
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", "expert, tensor"),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", "expert, tensor"),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "fsdp"),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1}}", "expert"),
    ],
)
def test_groups_of_devices_have_axes(written: str, axes: str) -> None:
    """On a mesh of fsdp 2 x expert 2 x tensor 2, where device 4 f + 2 e + t is at (f, e, t)."""
    assert axes_of(groups_in(f"x = f32[] all-gather(y), {written}, dimensions={{0}}"), (1, 1, 2, 2, 1, 2)) == axes

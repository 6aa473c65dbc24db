"""Layouts and collectives of recipes, as files that a change shows in: `make goldens` writes them anew.

Each recipe keeps its widths and has two periods of layers. Arrays are laid out without a device; the collectives are those that
`transformer plan` reads in the step that libtpu compiles for a topology, and depend on its release, which the file names.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from transformer.arguments import load_config
from transformer.benchmarks.measure import own_process
from transformer.checkpointing.run import resolve
from transformer.config import MESH_AXES, Config, replace, to_json
from transformer.models.parameters import is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.objectives import vocabulary, with_window
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import use_rules
from transformer.training.state import state_shardings

GOLDENS = Path(__file__).parent.parent / "goldens"
REWRITES = "REWRITE_GOLDENS" in os.environ
LENGTH, ROWS = 128, 8

# Recipe, split, and topology: eight chips in one slice or several.
PAIRS = (
    ("gpt2_124m", "fsdp=8", "v5e:2x4"),
    ("gpt2_124m", "replica=2 tensor=4", "2 v5e:2x2"),
    ("llama_1b", "fsdp=8", "v5p:2x2x2"),
    ("llama_1b", "fsdp=2 tensor=4 sequence_sharding", "v5e:2x4"),
    ("llama_1b", "replica=4 fsdp=2 shard_optimizer", "2 v6e:2x2"),
    ("llama_1b", "replica=2 fsdp=2 tensor=2", "2 v5p:2x2x1"),
    ("moe_8x", "fsdp=2 expert=4", "v5p:2x2x2"),
    ("moe_8x", "fsdp=2 expert=2 tensor=2", "v6e:2x4"),
    ("hybrid_1b", "fsdp=4 tensor=2", "v6e:2x4"),
    ("bert_base", "replica=8", "v5e:2x4"),
    ("t5_base", "fsdp=4 tensor=2", "v5e:2x4"),
    ("aiayn_base", "replica=2 fsdp=2 tensor=2", "2 v5e:2x2"),
)
NAMES = ["-".join([recipe, *split.replace("=", "").split()]) for recipe, split, _ in PAIRS]


def config_of(recipe: str, split: str) -> Config:
    """Returns a recipe with two periods of layers, short texts and a small batch."""
    words = [word.partition("=") for word in split.split()]
    parallel: dict[str, Any] = dict.fromkeys(MESH_AXES, 1)
    parallel |= {name: int(size) if size else True for name, _, size in words}
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


def collectives(config: Config, topology: str, directory: Path) -> Iterator[str]:
    """Yields a line for each kind of collective, axes and link of the step that is compiled, with its number in a step."""
    source, result = directory / "config.json", directory / "plan.json"
    source.write_text(to_json(config))
    slices, name = topology.split() if " " in topology else ("1", topology)
    flags = ["--config", str(source), "--topology", name, "--slices", slices, "--json", str(result)]
    # libtpu is told by chip what to do, once in a process; the suite's own devices and flags are not the plan's.
    command, environment = own_process("from transformer.cli import main; main()", ["plan", *flags])
    environment = {key: value for key, value in environment.items() if not key.startswith(("JAX_", "XLA_"))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts: Counter[tuple[str, str, str]] = Counter()
    for found in json.loads(result.read_text())["collectives"]:
        link = "DCN" if found["crosses_slices"] else "ICI"
        counts[found["kind"], ", ".join(found["axes"]) or "-", link] += found["count"]
    yield f"# collective | axes | link | times a step ({topology}; {releases()})"
    for (kind, axes, link), count in sorted(counts.items()):
        yield f"{kind} | {axes} | {link} | {count}"


def releases() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))


def compare(name: str, part: str, lines: Iterator[str]) -> None:
    path, text = GOLDENS / f"{name}.{part}.txt", "".join(f"{line}\n" for line in lines)
    if REWRITES:
        GOLDENS.mkdir(exist_ok=True)
        path.write_text(text)
    assert text.splitlines() == path.read_text().splitlines(), "if it is meant: `make goldens`"


@pytest.mark.parametrize(
    ("name", "recipe", "split"), [(n, *p[:2]) for n, p in zip(NAMES, PAIRS, strict=True)], ids=NAMES
)
def test_arrays_lie_where_they_lay(name: str, recipe: str, split: str) -> None:
    compare(name, "arrays", arrays(config_of(recipe, split)))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
@pytest.mark.parametrize(
    ("name", "recipe", "split", "topology"), [(n, *p) for n, p in zip(NAMES, PAIRS, strict=True)], ids=NAMES
)
def test_collectives_are_what_they_were(name: str, recipe: str, split: str, topology: str, tmp_path: Path) -> None:
    path = GOLDENS / f"{name}.collectives.txt"
    if not REWRITES and f"; {releases()})" not in path.read_text():
        pytest.skip(f"{path.name} is of other releases")
    compare(name, "collectives", collectives(config_of(recipe, split), topology, tmp_path))

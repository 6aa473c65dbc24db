"""The shape of the code: which module may import which, and how much of it `train.py` needs."""

import ast
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from transformer.config.model import FeedForwardKind
from transformer.models.mixers import MIXERS
from transformer.objectives import OBJECTIVES
from transformer.optimizers import OPTIMIZERS

ROOT = Path(__file__).parent.parent

LAYERS = (
    ("config", "arguments", "run_options"),
    ("models", "data", "parallel"),
    ("objectives", "optimizers", "checkpointing", "huggingface"),
    ("training", "inference"),
    ("finetuning", "interpretability", "benchmarks", "plans", "studies"),
    ("cli", "describe"),
)
"""Bottom first: a module imports its own layer and those below."""

HEAVY = ("tensorflow", "transformers", "torch", "wandb", "matplotlib")
CLOSURE_LINES = 5000


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    at_top: bool


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {_name(path): path for path in [ROOT / "train.py", *sorted((ROOT / "transformer").rglob("*.py"))]}


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def imports(name: str) -> tuple[Import, ...]:
    """Every import in a module, also inside functions, as the modules they load; those for type checkers alone are left out."""
    found: list[Import] = []

    def visit(node: ast.AST, at_top: bool) -> None:
        if _only_for_types(node):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.append(Import(whole if whole in modules() else str(node.module), node.lineno, at_top))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not inside)

    visit(ast.parse(modules()[name].read_text()), True)
    return tuple(found)


def _own(name: str) -> list[Import]:
    return [
        item for item in imports(name) if item.target.partition(".")[0] in ("transformer", "train", "configs", "tests")
    ]


def _layer(name: str) -> int:
    part = "cli" if name == "train" else name.split(".")[1]
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def _closure(start: str) -> set[str]:
    """`start` and all it loads, the packages on the way to each module included."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in modules():
            reached.add(name)
            waiting += [item.target for item in imports(name)] + [name.rpartition(".")[0]]
    return reached


def test_every_module_has_a_layer() -> None:
    known = {part for layer in LAYERS for part in layer}
    assert {name.split(".")[1] for name in modules() if name.count(".")} <= known


def test_imports_run_one_way() -> None:
    wrong = [
        f"{modules()[name].relative_to(ROOT)}:{item.line} imports {item.target}, of a higher layer"
        for name in modules()
        if name != "transformer"
        for item in _own(name)
        if not item.target.startswith("transformer.") or _layer(item.target) > _layer(name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for item in _own(name):
            if item.target in modules():
                walk(item.target, (*path, name))
        done.add(name)

    for name in modules():
        walk(name, ())


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_where_used(package: str) -> None:
    wrong = [
        f"{modules()[name].relative_to(ROOT)}:{item.line}"
        for name in modules()
        for item in imports(name)
        if item.at_top and item.target.partition(".")[0] == package
    ]
    assert not wrong, f"{package} at the top level of {', '.join(wrong)}"


def test_tensorflow_is_imported_nowhere() -> None:
    assert not [name for name in modules() for item in imports(name) if item.target.partition(".")[0] == "tensorflow"]


def test_data_is_free_of_jax() -> None:
    """The processes that tokenise and read are many: they must stay light."""
    reached = {name for start in modules() if start.startswith("transformer.data") for name in _closure(start)}
    assert len(reached) > 5, reached
    wrong = [
        name for name in reached for item in imports(name) if item.target.partition(".")[0] in ("jax", "flax", "optax")
    ]
    assert not wrong, wrong


def test_training_can_be_read_in_an_evening() -> None:
    """What the process that trains imports. What is found by name in tables is not counted: what only some recipes ask for (mixers,
    objectives, optimizers, trackers, tokenizer.json, samples), and two tables of all kinds of layers, the FLOPs that they cost and
    what implementations of attention take. Data is prepared by another process, `transformer.data.prepare`.
    """
    sizes = {name: len(modules()[name].read_text().splitlines()) for name in _closure("train")}
    table = "\n".join(f"{lines:6d}  {name}" for name, lines in sorted(sizes.items(), key=lambda item: -item[1]))
    assert len(sizes) > 5, f"the closure was not followed:\n{table}"
    assert sum(sizes.values()) < CLOSURE_LINES, f"{sum(sizes.values())} lines, {CLOSURE_LINES} allowed:\n{table}"


@pytest.mark.parametrize("name", ["transformer.training.step", "transformer.training.loop"])
def test_training_knows_no_model_by_name(name: str) -> None:
    """A new mixer, objective or optimizer is a file and a line in a table."""
    names = {*MIXERS, *OBJECTIVES, *OPTIMIZERS, *get_args(FeedForwardKind), "encoder", "decoder"} - {"none"}
    assert {"attention", "lstm", "causal", "muon", "experts"} <= names
    found = names & set(re.findall(r"[a-z]\w*", modules()[name].read_text().lower()))
    assert not found, found


def test_no_drawer_for_everything() -> None:
    paths = [
        *ROOT.glob("*.py"),
        *(path for top in ("transformer", "tests", "configs") for path in (ROOT / top).rglob("*.py")),
    ]
    assert not [str(path) for path in paths if path.stem in ("utils", "util", "common", "helpers", "misc")]


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import runpy, sys\n"
        "sys.argv = ['train.py', '--help']\n"
        "try:\n    runpy.run_path('train.py', run_name='__main__')\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('LOADED', sorted({{'jax', 'flax', 'grain', 'tensorflow_datasets', *{HEAVY!r}}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("LOADED []\n"), done.stdout[-500:]
    assert "--model.width" in done.stdout

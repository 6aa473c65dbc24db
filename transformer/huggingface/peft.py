"""Adapters in PEFT's format, out and in: adapter_config.json and adapter_model.safetensors, for a base in Hugging Face's layout.

The tables of the families say which linear map of theirs is which of ours. Where one of theirs joins several (GPT-2's queries, keys
and values), so do the adapters: A's one under another, B's in blocks, the rank being the sum. A map of theirs that comes with one
adapter gives it to each of ours, all of A and the rows of B, unless B has such blocks: what was written so is read as it was.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.checkpointing import bases
from transformer.checkpointing.loading import load_adapter
from transformer.checkpointing.new_run import check_new, write_run
from transformer.checkpointing.run import Run, load_run, make_model
from transformer.config import AdapterConfig, Config, ConfigError, place, problems_of, replace, write_atomically
from transformer.huggingface.exporting import family_for
from transformer.huggingface.folder import read_slice
from transformer.huggingface.header import Stored, read_header, read_json, shown
from transformer.huggingface.table import Family, Tensor, tensors_of
from transformer.huggingface.translation import canonical, write_config
from transformer.huggingface.writing import write_tensors
from transformer.models import adapters
from transformer.models.parameters import Tree, divide, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import sharding

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FINGERPRINT = "base_fingerprint"
"""In the metadata of the tensors' file: that of the base, as base.json has it."""
TASKS = {"decoder": "CAUSAL_LM", "encoder_decoder": "SEQ_2_SEQ_LM", "encoder": None}

UNREAD: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
"""Keys of adapter_config.json that have to say this: otherwise an adapter does more than one of ours can."""

CHANGED = ("pissa", "olora", "loftq", "corda", "eva_residual", "lora_ga")
"""Ways to begin that change the base's own weights, so that the adapter is for another base."""

Flat = dict[str, np.ndarray]


def export_adapter(
    run: Run, mesh: Mesh, target: Path, family_name: str, step: int | None, best: bool, average: int
) -> str:
    """Writes the adapter of a run as PEFT reads it, and returns a sentence about it. Raises ConfigError for what it cannot say."""
    if run.config.adapter.kind == "none":
        raise ConfigError(f"{run.workdir} holds no adapter: export it with --format huggingface")
    if target.exists():
        raise ConfigError(f"{target} is there already: give a new folder")
    family = family_for(run.config.model, family_name)
    model, trained, step = load_adapter(run, mesh, step, best, average)
    base = bases.base_of(run)
    given, tensors = written(model, trained, family)
    more = {"base_model_name_or_path": str(base.run.workdir), "task_type": TASKS[model.config.architecture]}
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        shapes = [(name, values.shape) for name, values in tensors.items()]
        write_tensors(partial / WEIGHTS, shapes, tensors.items(), metadata={FINGERPRINT: base.fingerprint})
        write_atomically(partial / CONFIG, json.dumps(given | more, indent=2) + "\n")
        os.chmod(partial, 0o755)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return f"{target}: the adapter of step {step}, {sum(map(np.size, tensors.values())):,} numbers, for a base of {family.model_type}"


def import_adapter(folder: Path, workdir: Path, config: Config, mesh: Mesh) -> str:
    """Makes the run `workdir` of an adapter in PEFT's format, for the base that `adapter.base_run` names; returns a sentence.

    Raises ConfigError for what our adapters cannot say, for another base, and for tensors that are not those of the base.
    """
    check_new(workdir, "--workdir")
    if not config.adapter.base_run:
        raise ConfigError(f"{folder} holds an adapter: give --adapter.base-run, the run of the model that it is for")
    given = read_json(folder / CONFIG)
    if not isinstance(given, dict):
        raise ConfigError(f"{folder / CONFIG} is not an object")
    stored, metadata = read_header(folder / WEIGHTS)
    base = bases.Base(load_run(place(config.adapter.base_run)), None, metadata.get(FINGERPRINT, ""))
    family = family_for(base.run.config.model)
    found, arrays = read(given, stored, base.run.config.model, family, str(folder))
    adapter = dataclasses.replace(found, base_run=config.adapter.base_run)
    whole = replace(base.run.config, adapter=adapter)
    if problems := [problem for problem in problems_of(whole) if "adapter." in problem]:
        raise ConfigError([f"{folder}: {problem}" for problem in problems])
    model = make_model(whole, jax.default_backend())
    _, known = base.parameters(model, mesh)
    specs, _ = divide(parameter_specs(model), parameter_specs(model))
    params = _tree(
        {
            path: jax.device_put(arrays[path], sharding(mesh, spec.axes, spec.shape))
            for path, spec in _flat(specs).items()
        }
    )
    write_run(workdir, whole, base.run, params, 0, {bases.BASE: known})
    return f"{workdir}: an adapter of rank {adapter.rank} for {adapter.base_run}"


def modules(family: Family, model: Any) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """Returns their linear maps by name, each with its tensor and the pieces of it by the paths of our maps."""
    found, without = {}, _prefix_without(family, model)
    for tensor in tensors_of(family, canonical(model)):
        pieces = {
            piece.path.removesuffix("/kernel"): piece for piece in tensor.pieces if piece.path.endswith("/kernel")
        }
        if pieces and tensor.name.endswith(".weight") and all(len(piece.at) <= 1 for piece in tensor.pieces):
            found[tensor.name.removesuffix(".weight").removeprefix(without)] = tensor, pieces
    return found


def _prefix_without(family: Family, model: Any) -> str:
    """Returns what the names of modules do not begin with: in a class without a head, what in others names all but the head."""
    [name] = write_config(family, model)["architectures"]
    return "" if "For" in name or "LMHead" in name else family.prefix


def _joins_outputs(tensor: Tensor) -> bool:
    return tensor.line.axis == (0 if tensor.line.transposed else 1)


def written(model: Transformer, trained: Tree, family: Family) -> tuple[dict[str, Any], Flat]:
    """Returns adapter_config.json and the tensors of an adapter."""
    ours = {"/".join(map(str, path)): linear for path, linear in adapters.adapters(model).items()}
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in _flat(trained).items()}
    whole = [path for path in leaves if path.rpartition("/")[2] not in adapters.ADDED]
    if whole:
        raise ConfigError(
            f"{', '.join(whole)}: trained as a whole, for which PEFT's format has no place here; merge the run"
        )
    adapter = next(iter(ours.values())).adapter
    tensors: Flat = {}
    ranks: dict[str, int] = {}
    every = modules(family, model.config)
    for name, (tensor, pieces) in every.items():
        chosen = [path for path in pieces if path in ours]
        if not chosen:
            continue
        if len(pieces) > 1 and not _joins_outputs(tensor):
            raise ConfigError(f"{name} joins the inputs of several maps, which an adapter of PEFT's cannot")
        if adapter.kind == "dora" and len(chosen) < len(pieces):
            rest = ", ".join(path for path in pieces if path not in ours)
            raise ConfigError(f"{name} is {', '.join(chosen)} and {rest} in one: with DoRA all of them need an adapter")
        outputs, inputs = tensor.shape if tensor.line.transposed else tensor.shape[::-1]
        ranks[name] = rank = adapter.rank * len(chosen)
        down, up = np.zeros((rank, inputs), np.float32), np.zeros((outputs, rank), np.float32)
        magnitude = np.zeros(outputs, np.float32)
        for number, path in enumerate(chosen):
            piece, rows = pieces[path], slice(number * adapter.rank, (number + 1) * adapter.rank)
            columns, lines = _places(tensor, piece, inputs, outputs)
            down[rows, columns] = leaves[f"{path}/lora_a"][piece.at].T
            up[lines, rows] = leaves[f"{path}/lora_b"][piece.at].T
            if adapter.kind == "dora":
                magnitude[lines] = leaves[f"{path}/magnitude"][piece.at]
        tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = down, up
        if adapter.kind == "dora":
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = magnitude
    covered = {path for _, pieces in every.values() for path in pieces}
    if lacking := sorted(ours.keys() - covered):
        raise ConfigError(f"{family.model_type} has no linear map that is {', '.join(lacking)}")
    power = 0.5 if adapter.rank_stabilized else 1.0
    other = {name: rank for name, rank in ranks.items() if rank != adapter.rank}
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": adapter.kind == "dora",
        "lora_dropout": adapter.dropout,
        "target_modules": _short(ranks, every),
        "fan_in_fan_out": not all(every[name][0].line.transposed for name in ranks),
        "bias": "none",
        "inference_mode": True,
        # alpha / rank^power stays what it is.
        "rank_pattern": other,
        "alpha_pattern": {name: adapter.alpha * (rank / adapter.rank) ** power for name, rank in other.items()},
    }, tensors


def _places(tensor: Tensor, piece: Any, inputs: int, outputs: int) -> tuple[Any, Any]:
    """Returns which of their inputs and outputs ours are."""
    return (np.arange(inputs), piece.places) if _joins_outputs(tensor) else (piece.places, np.arange(outputs))


def _short(chosen: Iterable[str], every: Iterable[str]) -> list[str]:
    """Returns the last names of modules if they say which are meant, else all names in full."""
    names = {name.rpartition(".")[2] for name in chosen}
    meant = {name for name in every if name.rpartition(".")[2] in names}
    return sorted(names if meant == set(chosen) else chosen)


def read(
    given: Mapping[str, Any], stored: Mapping[str, Stored], model: Any, family: Family, where: str
) -> tuple[AdapterConfig, Flat]:
    """Returns the keys of an adapter of ours, and its arrays by path; `model` is that of the base."""
    problems = [
        f"{where}/{CONFIG}: {key} = {shown(given[key])}, and what is read has {' or '.join(map(repr, allowed))}"
        for key, allowed in UNREAD.items()
        if key in given and given[key] not in allowed
    ]
    if given.get("peft_type") != "LORA":
        problems.append(f"{where}/{CONFIG}: peft_type = {shown(given.get('peft_type'))}, and what is read is 'LORA'")
    begun = given.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGED):
        problems.append(
            f"{where}/{CONFIG}: init_lora_weights = {begun!r} changes the base itself: merge it by PEFT first"
        )
    alphas = given.get("alpha_pattern") or {}
    numbers = {"lora_alpha": given.get("lora_alpha", 8), "lora_dropout": given.get("lora_dropout") or 0.0}
    numbers |= {f"alpha_pattern[{key!r}]": value for key, value in alphas.items()} if isinstance(alphas, dict) else {}
    if not isinstance(alphas, dict):
        problems.append(f"{where}/{CONFIG}: alpha_pattern = {shown(alphas)} is not an object")
    problems += [
        f"{where}/{CONFIG}: {key} = {shown(value)} is not a number"
        for key, value in numbers.items()
        if type(value) not in (int, float) or not math.isfinite(value)
    ]
    if problems:
        raise ConfigError(problems)
    model = dataclasses.replace(model, scan_layers=bool(model.scan_layers))
    every, left = modules(family, model), dict(stored)
    # Of a class without a head either name is read.
    names = dict.fromkeys(("", _prefix_without(family, model)))
    prefixes = [begin + name for begin in (PREFIX, PREFIX + "base_model.", "") for name in names]
    is_dora, stabilized = bool(given.get("use_dora")), bool(given.get("use_rslora"))
    power = 0.5 if stabilized else 1.0
    pieces_found: dict[str, dict[tuple[int, ...], Flat]] = {}
    scales: list[tuple[float, int]] = []
    for name, (tensor, pieces) in every.items():
        prefix = next((p for p in prefixes if f"{p}{name}.lora_A.weight" in left), None)
        if prefix is None:
            continue
        down = _taken(left, f"{prefix}{name}.lora_A.weight", where)
        up = _taken(left, f"{prefix}{name}.lora_B.weight", where)
        outputs, inputs = tensor.shape if tensor.line.transposed else tensor.shape[::-1]
        rank = down.shape[0]
        if down.shape != (rank, inputs) or up.shape != (outputs, rank):
            shapes = f"lora_A {down.shape} and lora_B {up.shape}"
            problems.append(f"{name} has {shapes}, and the base's map is {inputs} to {outputs}")
            continue
        magnitude = None
        if is_dora:
            vector = f"{prefix}{name}.lora_magnitude_vector"
            magnitude = _taken(left, vector if vector in left else f"{vector}.weight", where).reshape(-1)
        alpha = float(_of(alphas, name, numbers["lora_alpha"]))
        scale = alpha / rank**power
        for path, part in _parts(tensor, pieces, down, up, magnitude).items():
            pieces_found.setdefault(path, {})[pieces[path].at] = part | {"scale": np.asarray(scale)}
            scales.append((scale, part["lora_a"].shape[1]))
    problems += [f"{shown(name)} {tensor.shape} is of no linear map of the base" for name, tensor in left.items()]
    if not scales:
        problems.append("there is no lora_A of any linear map of the base")
    if problems:
        raise ConfigError([f"{where}/{WEIGHTS}: {problem}" for problem in problems])
    rank = max(rank for _, rank in scales)
    scale = scales[0][0]
    plain = {"/".join(map(str, path)) for path in adapters.linear_maps(Transformer(model))}
    names = {path.rpartition("/")[2] for path in pieces_found}
    by_name = {path for path in plain if path.rpartition("/")[2] in names} == set(pieces_found)
    targets = ("*",) if plain == set(pieces_found) else tuple(sorted(names if by_name else pieces_found))
    arrays: Flat = {}
    specs = _flat(parameter_specs(Transformer(model)))
    for path, layers in pieces_found.items():
        kernel = specs[f"{path}/kernel"]
        *leading, inputs, outputs = kernel.shape
        a, b = np.zeros((*leading, inputs, rank), np.float32), np.zeros((*leading, rank, outputs), np.float32)
        for at, part in layers.items():
            own = part["lora_a"].shape[1]
            a[at][:, :own] = part["lora_a"]
            b[at][:own] = (
                part["lora_b"] * np.float32(part["scale"] / scale) if part["scale"] != scale else part["lora_b"]
            )
        arrays |= {f"{path}/lora_a": a, f"{path}/lora_b": b}
        if is_dora:
            if len(layers) < math.prod(leading):
                raise ConfigError(f"{where}: {path} has magnitudes in some of its layers only")
            arrays[f"{path}/magnitude"] = np.stack([layers[at]["magnitude"] for at in sorted(layers)]).reshape(
                *leading, outputs
            )
    adapter = AdapterConfig(
        kind="dora" if is_dora else "lora",
        rank=rank,
        alpha=scale * rank**power,
        rank_stabilized=stabilized,
        targets=targets,
        also_trained=(),
        dropout=float(given.get("lora_dropout") or 0.0),
    )
    return adapter, arrays


def _parts(
    tensor: Tensor, pieces: Mapping[str, Any], down: np.ndarray, up: np.ndarray, magnitude: np.ndarray | None
) -> dict[str, Flat]:
    """Returns A, B and magnitudes of each of our maps in one of theirs."""
    outputs, inputs = up.shape[0], down.shape[1]
    count, rank = len(pieces), down.shape[0]
    lines = {path: _places(tensor, piece, inputs, outputs) for path, piece in pieces.items()}
    own = {path: slice(n * rank // count, (n + 1) * rank // count) for n, path in enumerate(pieces)}
    blocks = up.copy()
    for path, (_, rows) in lines.items():
        blocks[np.ix_(rows, np.arange(rank)[own[path]])] = 0
    in_blocks = count > 1 and rank % count == 0 and not blocks.any()
    found = {}
    for path, (columns, rows) in lines.items():
        ranks = own[path] if in_blocks else slice(None)
        part = {"lora_a": down[ranks, columns].T, "lora_b": up[rows][:, ranks].T}
        found[path] = part if magnitude is None else part | {"magnitude": magnitude[rows]}
    return found


def _taken(left: dict[str, Stored], name: str, where: str) -> np.ndarray:
    if name not in left:
        raise ConfigError(f"{where}/{WEIGHTS}: {shown(name)} is missing")
    stored = left.pop(name)
    parts = [part for _, part in read_slice(stored, tuple(slice(0, size) for size in stored.shape))]
    return np.concatenate(parts).astype(np.float32).reshape(stored.shape)


def _of(patterns: Mapping[str, int | float], name: str, default: int | float) -> int | float:
    """Returns what alpha_pattern says of a module: the first of its patterns that the name, or an end of it after a dot, is."""
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise ConfigError(f"alpha_pattern: {shown(pattern)} is no regular expression: {error}") from error
    return default


def _flat(tree: Tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=adapters.is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _tree(flat: Mapping[str, Any]) -> Tree:
    tree: Tree = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        inside: dict[Any, Any] = tree
        for name in parents:
            inside = inside.setdefault(int(name) if name.isdigit() else name, {})
        inside[last] = leaf
    return tree

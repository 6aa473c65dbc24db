"""A run becomes a folder that transformers loads: `transformer export`."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from transformer.checkpointing.run import TOKENIZER, Run
from transformer.config import ConfigError, ModelConfig, write_atomically
from transformer.huggingface import published
from transformer.huggingface.card import model_card
from transformer.huggingface.families import FAMILIES, family_of
from transformer.huggingface.folder import Folder, read_slice
from transformer.huggingface.header import read_json
from transformer.huggingface.reading import model_of
from transformer.huggingface.table import Family, tensors_of
from transformer.huggingface.translation import canonical, laid_out, write_config
from transformer.huggingface.writing import SHARD_SIZE, TYPES, DType, gathered, write
from transformer.models.parameters import Tree


def family_for(model: ModelConfig, name: str = "", preferred: str = "") -> Family:
    """Returns the family that says exactly what the model is, `name` if it is given.

    Raises ConfigError with what stands in the way, of the family that comes nearest, if there is none.
    """
    if name:
        write_config(family_of(name), model)
        return family_of(name)
    problems: dict[str, tuple[str, ...]] = {}
    first: list[str] = [preferred] if preferred in FAMILIES else []
    for candidate in (*first, *(name for name in FAMILIES if name != preferred)):
        try:
            write_config(family_of(candidate), model)
            tensors_of(family_of(candidate), canonical(model))
            return family_of(candidate)
        except ConfigError as error:
            problems[candidate] = error.problems
    nearest = min(problems, key=lambda candidate: len(problems[candidate]))
    tried = ", ".join(problems)
    raise ConfigError([f"no family says what this model is (tried {tried}); nearest is {nearest}:", *problems[nearest]])


def export_model(
    run: Run,
    model: ModelConfig,
    params: Tree,
    step: int,
    target: Path,
    family: Family,
    dtype: DType = "float32",
    shard_size: int = SHARD_SIZE,
) -> list[str]:
    """Writes the folder `target`, reads it again and compares it bit by bit; returns notes about it.

    It appears whole, by a rename, or not at all. Raises ConfigError if it is there already.
    """
    if target.exists():
        raise ConfigError(f"{target} is there already: give a new folder")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target}: the directory {target.absolute().parent} does not exist")
    if model.architecture == "encoder_decoder" and model.decoder_start_token is None:
        # What the run leaves to its tokenizer, config.json has to say.
        model = dataclasses.replace(model, decoder_start_token=run.tokenizer.bos)
    saved = run.workdir / TOKENIZER
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        ids = published.special_ids(run.tokenizer, saved)
        write(partial, family, model, params, dtype, shard_size, ids)
        generation = saved / published.PUBLISHED / "generation_config.json"
        content = read_json(generation) if generation.is_file() else ids
        write_atomically(partial / "generation_config.json", json.dumps(content, indent=2) + "\n")
        problem = published.write_tokenizer(saved, run.tokenizer, partial)
        notes = [f"The tokenizer is not part of this folder: {problem}."] if problem else []
        theirs = read_json(partial / "config.json")
        write_atomically(partial / "README.md", model_card(run, model, step, theirs, dtype, notes))
        verify(partial, model, params, dtype)
        for path in partial.iterdir():
            os.chmod(path, 0o644)
        os.chmod(partial, 0o755)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return notes


def verify(path: Path, model: ModelConfig, params: Tree, dtype: DType) -> None:
    """Raises ConfigError unless a folder holds exactly this model, rounded to `dtype`."""
    folder = Folder(path)
    family, found = model_of(folder)
    if found != canonical(model):
        raise AssertionError(f"{path}: config.json came out as another model: {differing(found, canonical(model))}")
    leaves: Mapping[str, Any] = {
        jax.tree_util.keystr(key, simple=True, separator="/"): leaf
        for key, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    for tensor in tensors_of(family, laid_out(model)):
        stored = folder.tensors[tensor.name]
        wanted = gathered(tensor, leaves, model).astype(TYPES[dtype][1])
        for rows, part in read_slice(stored, tuple(slice(0, size) for size in stored.shape)):
            if part.tobytes() != wanted[rows].tobytes():
                raise OSError(f"{path}: {tensor.name} came out of the disk other than it was written")


def differing(one: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns a sentence for each key in which two models differ."""
    names = [item.name for item in dataclasses.fields(ModelConfig)]
    pairs = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return [f"model.{name} = {a!r}, {b!r} in the other" for name, (a, b) in pairs.items() if a != b]


def norms(one: Any, other: Any) -> tuple[float, float]:
    """Returns the largest absolute difference of two arrays, and norm(one - other) / norm(other)."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    size = float(np.linalg.norm(np.asarray(other, np.float64)))
    distance = float(np.linalg.norm(difference))
    return float(np.max(np.abs(difference), initial=0)), distance / size if size else (
        0.0 if not distance else float("inf")
    )

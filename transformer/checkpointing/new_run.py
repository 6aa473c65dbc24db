"""A run directory made at once, with one checkpoint: what is merged, or comes from elsewhere."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.run import CHECKPOINTS, CONFIG, CORPUS, TOKENIZER, Run
from transformer.config import Config, ConfigError, to_json, write_atomically
from transformer.models.parameters import Tree


def check_new(workdir: Path, flag: str) -> None:
    """Raises ConfigError if there is something at a path where a run is to be made."""
    if not isinstance(workdir, Path):
        raise ConfigError(f"{flag} = {str(workdir)!r}: make it in a local directory, and copy that")
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"{flag} = {str(workdir)!r} is there already: give a new directory")


def write_run(
    workdir: Path, config: Config, like: Run, params: Tree, step: int, files: Mapping[str, Any] | None = None
) -> None:
    """Writes a run with the tokenizer and the corpus of another, and `files` of JSON; it appears whole, by a rename, or not at all."""
    workdir = workdir.absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{workdir.name}.", dir=workdir.parent))
    try:
        shutil.copytree(like.workdir / TOKENIZER, partial / TOKENIZER)
        with Checkpoints(partial / CHECKPOINTS, config.checkpoint) as checkpoints:
            checkpoints.save(step, params, {"step": jnp.int32(step)})
            checkpoints.wait()
        for name, content in (files or {}).items():
            write_atomically(partial / name, json.dumps(content, indent=2) + "\n")
        write_atomically(partial / CORPUS, json.dumps({"fingerprint": like.data_fingerprint}) + "\n")
        write_atomically(partial / CONFIG, to_json(config))
        os.chmod(partial, 0o755)
        os.replace(partial, workdir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

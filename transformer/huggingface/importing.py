"""A published model becomes a run: `transformer import`."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.fixed import MAY_CHANGE
from transformer.checkpointing.run import CHECKPOINTS, CONFIG, CORPUS, TOKENIZER
from transformer.config import Config, ConfigError, ModelConfig, replace, to_json, write_atomically
from transformer.config.absolute import absolute
from transformer.huggingface import published, reading
from transformer.huggingface.folder import Folder

OBJECTIVES = {"decoder": "causal", "encoder": "masked_lm", "encoder_decoder": "span_corruption"}
"""What a model of each architecture goes on to learn, unless the configuration says otherwise."""


def import_model(folder: Folder, workdir: Path, config: Config, mesh: Mesh) -> ModelConfig:
    """Makes the run directory `workdir` of the model in a folder, with a checkpoint of step 0; returns the model.

    `config` says all that the model does not: data, training, how it is computed. The directory appears whole, by a rename, or
    not at all. Raises ConfigError for whatever is wrong with the folder.
    """
    if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
        raise ConfigError(f"--workdir = {str(workdir)!r} is there already: give a new directory")
    family, model = reading.model_of(folder)
    reading.matched(folder, family, model)
    tokenizer, kind, kept = published.tokenizer_of(folder, model)
    workdir = workdir.absolute()
    workdir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{workdir.name}.", dir=workdir.parent))
    try:
        params = reading.read_parameters(folder, family, model, mesh)
        tokenizer.save(partial / TOKENIZER)
        for name, content in kept.items():
            write_atomically(partial / TOKENIZER / published.PUBLISHED / name, content)
        with Checkpoints(partial / CHECKPOINTS, config.checkpoint, compresses=False) as checkpoints:
            checkpoints.save(0, params, {"step": jnp.int32(0)})
            del params
            checkpoints.wait()
        # No corpus yet: the run takes the first that it is trained on.
        write_atomically(partial / CORPUS, json.dumps({"fingerprint": ""}) + "\n")
        mask = getattr(tokenizer, "mask", None)
        write_atomically(partial / CONFIG, to_json(run_config(model, config, kind, workdir / TOKENIZER, mask)))
        os.chmod(partial, 0o755)
        os.replace(partial, workdir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return model


def run_config(model: ModelConfig, config: Config, kind: str, tokenizer: Path, mask: int | None = None) -> Config:
    """Returns the configuration of the run: the model's, with what of it may change as `config` has it. `mask` is the
    tokenizer's own token for what masked language modelling asks for."""
    asked = {
        key.removeprefix("model."): getattr(config.model, key.removeprefix("model."))
        for key in MAY_CHANGE
        if key.startswith("model.")
    }
    model = dataclasses.replace(model, **asked)
    data: dict[str, Any] = {**absolute(config.data), "tokenizer": kind, "tokenizer_path": str(tokenizer)}
    if model.positions == "learned" and model.num_positions:
        data["sequence_length"] = min(config.data.sequence_length, model.num_positions)
    objective: dict[str, Any] = {} if model.architecture == "decoder" else {"name": OBJECTIVES[model.architecture]}
    if model.num_labels:
        objective = {"name": "sequence_classification" if model.pooler else "token_classification"}
    objective = objective if config.objective.name == "causal" else {}
    if model.architecture == "encoder" and not model.num_labels and config.objective.mask_token is None:
        objective["mask_token"] = mask
    return replace(config, model=dataclasses.asdict(model), data=data, objective=objective)


def folder_of(name: str) -> Folder:
    """Returns the folder of that path or, where there is none, of that model on the hub; raises ConfigError."""
    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 1 or name.startswith((".", "~", "/")):
        return Folder(path)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise ConfigError(f"{name!r} is not a folder; to fetch a model of the hub install the extra hf") from error
    patterns = ["*.safetensors", "*.safetensors.index.json", "tokenizer.json", "tokenizer.model", *published.KEPT]
    try:
        return Folder(Path(snapshot_download(name, allow_patterns=patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        problem = (str(error).strip() or repr(error)).splitlines()[0]
        raise ConfigError(f"{name!r} is not a folder, and the hub does not give it: {problem}") from error


def report(model: ModelConfig, params: int, workdir: Path) -> str:
    return f"{workdir}: {model.architecture} of {params:,} parameters, step 0"


def one_process() -> None:
    if jax.process_count() > 1:
        raise ConfigError(
            "import and export run in one process; `init_from.huggingface` reads with as many as there are"
        )

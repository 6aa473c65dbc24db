"""A run directory: config.json, the tokenizer, checkpoints; all that any verb needs of a run."""

import dataclasses
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from transformer.config import (
    Config,
    ConfigError,
    ModelConfig,
    ParallelConfig,
    from_json,
    replace,
    source_length,
    to_json,
    write_atomically,
)
from transformer.data.prepared import Prepared
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.objectives import objective_of

CONFIG, CORPUS, TOKENIZER, CHECKPOINTS = "config.json", "corpus.json", "tokenizer", "checkpoints"


@dataclass(frozen=True)
class Run:
    """What stands in a run directory."""

    workdir: Any
    """A Path; in an object store an `etils.epath.Path`."""
    config: Config
    tokenizer: Tokenizer
    data_fingerprint: str


@dataclass(frozen=True)
class Place:
    """Where a run is, as `places.opened` gives it."""

    workdir: Any
    files: Path
    """Where all but the checkpoints is written: the run directory, or the local copy of one in an object store."""
    upload: Callable[[], None] = lambda: None


def load_run(workdir: PurePath) -> Run:
    """Reads a run directory; raises ConfigError if it is not one."""
    if not isinstance(workdir, Path):
        return importlib.import_module("transformer.checkpointing.places").load_run(workdir)
    try:
        text = (workdir / CONFIG).read_text()
        corpus = json.loads((workdir / CORPUS).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"{workdir} is not a run directory: it has no {Path(error.filename).name}"
        raise ConfigError(problem) from error
    config = from_json(text, str(workdir / CONFIG))
    return Run(workdir, config, load_tokenizer(workdir / TOKENIZER), corpus["fingerprint"])


def open_run(workdir: Path, config: Config, prepared: Prepared, is_writer: bool) -> None:
    """Begins a run in `workdir`, or joins the one that is there.

    Raises ConfigError with every differing key if the run there is another one. Only the process with `is_writer` writes.
    """
    if (workdir / CONFIG).exists():
        run = load_run(workdir)
        problems = importlib.import_module("transformer.checkpointing.fixed").contradictions(run.config, config)
        if run.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
            problems.append("data.tokenizer: the run was trained with another tokenizer")
        elif run.data_fingerprint not in ("", prepared.fingerprint):  # what was imported has no corpus
            problems.append("data: the run was trained on another corpus, or the files of the corpus have changed")
        if problems:
            advice = "start in another --workdir, or give the run's own values"
            raise ConfigError([f"{workdir} is the directory of another run: {advice}", *problems])
    elif strangers := [name for name in (CHECKPOINTS, "metrics.jsonl") if (workdir / name).exists()]:
        raise ConfigError(f"{workdir} is not a run directory: it has no {CONFIG}, but {' and '.join(strangers)}")
    if is_writer:
        prepared.tokenizer.save(workdir / TOKENIZER)
        write_atomically(workdir / CORPUS, json.dumps({"fingerprint": prepared.fingerprint}) + "\n")
        # Which process this was is not the run's.
        here = ParallelConfig()
        alone = {"coordinator": here.coordinator, "num_processes": here.num_processes, "process_id": here.process_id}
        absolute = importlib.import_module("transformer.config.absolute").absolute(config.data)
        write_atomically(workdir / CONFIG, to_json(replace(config, parallel=alone, data=absolute)))


def resolve(config: Config, vocab_size: int, num_labels: int = 0) -> Config:
    """Returns `config` with everything that depends on tokenizer and data filled in.

    Raises ConfigError if the model's vocabulary is smaller than the tokenizer's, with the objective's own tokens, or if
    it has fewer labels than the data.
    """
    model = config.model
    if 0 < model.num_labels < num_labels:
        problem = f"model.num_labels = {model.num_labels} is smaller than the {num_labels} labels of the data"
        raise ConfigError(f"{problem}: give at least that, or leave it out")
    vocab_size += objective_of(config).num_extra_tokens(config)
    if model.vocab_size is not None and model.vocab_size < vocab_size:
        problem = f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {vocab_size} tokens"
        raise ConfigError(f"{problem}: give at least that, or leave it out")
    num_positions = model.num_positions or max(config.data.sequence_length, source_length(config))
    found = {"vocab_size": model.vocab_size or vocab_size, "num_labels": model.num_labels or num_labels}
    return replace(config, model=found | {"num_positions": num_positions})


def for_platform(model: ModelConfig, platform: str) -> ModelConfig:
    """Returns `model` with what it leaves to the hardware decided; a run directory does not keep these decisions."""
    scan = platform != "cpu" if model.scan_layers is None else model.scan_layers
    return dataclasses.replace(model, scan_layers=scan)

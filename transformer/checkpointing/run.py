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
from transformer.models.transformer import Transformer
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
    labels: tuple[str, ...] = ()
    """Names of the classes, in order of their numbers; none where they have no names."""


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
        missing = Path(error.filename).name
        problem = f"{workdir} is not a run directory: it has no {missing}"
        if missing == CORPUS and '"model_type"' in (workdir / CONFIG).read_text():
            problem += "; of a model in Hugging Face's layout `transformer import` makes one"
        raise ConfigError(problem) from error
    config = from_json(text, str(workdir / CONFIG))
    labels = tuple(corpus.get("labels", ()))
    return Run(workdir, config, load_tokenizer(workdir / TOKENIZER), corpus["fingerprint"], labels)


def open_run(workdir: Path, config: Config, prepared: Prepared, is_writer: bool) -> None:
    """Begins a run in `workdir`, or joins the one that is there.

    Raises ConfigError with every differing key if the run there is another one. Only the process with `is_writer` writes.
    """
    if (workdir / CONFIG).exists():
        run = load_run(workdir)
        problems = importlib.import_module("transformer.checkpointing.fixed").contradictions(run.config, config)
        if run.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
            problems.append("data.tokenizer: the run was trained with another tokenizer")
        elif not run.data_fingerprint:
            problems.append("it holds a model alone, which was imported: begin another run with it, by init_from.run")
        elif run.data_fingerprint != prepared.fingerprint:
            problems.append("data: the run was trained on another corpus, or the files of the corpus have changed")
        if problems:
            advice = "start in another --workdir, or give the run's own values"
            raise ConfigError([f"{workdir} is the directory of another run: {advice}", *problems])
    elif strangers := [name for name in (CHECKPOINTS, "metrics.jsonl") if (workdir / name).exists()]:
        raise ConfigError(f"{workdir} is not a run directory: it has no {CONFIG}, but {' and '.join(strangers)}")
    if is_writer:
        prepared.tokenizer.save(workdir / TOKENIZER)
        corpus = {"fingerprint": prepared.fingerprint, "labels": prepared.labels}
        write_atomically(workdir / CORPUS, json.dumps(corpus) + "\n")
        # Which process this was is not the run's.
        here = ParallelConfig()
        alone = {"coordinator": here.coordinator, "num_processes": here.num_processes, "process_id": here.process_id}
        names = importlib.import_module("transformer.config.absolute")
        files = {"data": names.absolute(config.data), "init_from": names.absolute_start(config.init_from)}
        write_atomically(workdir / CONFIG, to_json(replace(config, parallel=alone, **files)))


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


def make_model(config: Config, platform: str) -> Transformer:
    """Returns the model of a resolved configuration, with the adapters that it asks for."""
    model = Transformer(for_platform(config.model, platform))
    if config.adapter.kind == "none":
        return model
    return importlib.import_module("transformer.models.adapters").adapted(model, config.adapter)


def for_platform(model: ModelConfig, platform: str) -> ModelConfig:
    """Returns `model` with what it leaves to the hardware decided; a run directory does not keep these decisions."""
    scan = platform != "cpu" if model.scan_layers is None else model.scan_layers
    return dataclasses.replace(model, scan_layers=scan)

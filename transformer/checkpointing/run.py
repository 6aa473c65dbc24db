"""A run directory: config.json, the tokenizer, checkpoints; all that any verb needs of a run."""

import contextlib
import dataclasses
import fcntl
import glob
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    from_json,
    get,
    keys,
    replace,
    source_length,
    to_json,
    write_atomically,
)
from transformer.data.prepared import Prepared
from transformer.data.tokenizers import Tokenizer, load_tokenizer
from transformer.objectives import objective_of

CONFIG, CORPUS, TOKENIZER, CHECKPOINTS = "config.json", "corpus.json", "tokenizer", "checkpoints"

MAY_CHANGE = (
    *(
        f"model.{name}"
        for name in ("attention_implementation", "scan_layers", "remat", "compute_dtype", "matrix_products", "dropout")
    ),
    *("model.balance_loss", "model.router_z_loss"),
    *("objective.z_loss", "objective.label_smoothing", "objective.future_weight"),
)
"""Keys of `model` and `objective` that change neither the parameters nor what they mean, nor the examples."""

FIXED = (
    *(key for key in keys() if key.startswith("model.") and key not in MAY_CHANGE),
    *("data.sequence_length", "data.source_length", "data.window_length"),
    *("data.shuffle", "data.shift_windows", "data.weights"),
    *(key for key in keys() if key.startswith("objective.") and key not in MAY_CHANGE),
    *("optimizer.name", "optimizer.momentum", "optimizer.ema_decay"),
    *("train.batch_size", "train.batch_warmup_steps", "seed"),
)
"""Keys that a run keeps for life: with another value the checkpoint would not fit, or the data would start anew."""


@dataclass(frozen=True)
class Run:
    """What stands in a run directory."""

    workdir: Path
    config: Config
    tokenizer: Tokenizer
    data_fingerprint: str


def load_run(workdir: Path) -> Run:
    """Reads a run directory; raises ConfigError if it is not one."""
    try:
        text = (workdir / CONFIG).read_text()
        corpus = json.loads((workdir / CORPUS).read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        problem = f"{workdir} is not a run directory: it has no {Path(error.filename).name}"
        raise ConfigError(problem) from error
    config = from_json(text, str(workdir / CONFIG))
    return Run(workdir, config, load_tokenizer(workdir / TOKENIZER), corpus["fingerprint"])


def contradictions(old: Config, new: Config) -> list[str]:
    """Returns a sentence for each fixed key in which `new` differs from the run's `old` configuration."""
    # A batch that grows does so by microbatches; a schedule-free run keeps points from which beta1 tells the average.
    grows, averages = old.train.batch_warmup_steps > 0, old.optimizer.name == "schedule_free"
    fixed = (*FIXED, *["train.num_microbatches"] * grows, *["optimizer.beta1"] * averages)
    return [
        f"{key} = {get(new, key)!r} contradicts the run, which has {get(old, key)!r}"
        for key in fixed
        if get(old, key) != get(new, key)
    ]


def open_run(workdir: Path, config: Config, prepared: Prepared, is_writer: bool) -> None:
    """Begins a run in `workdir`, or joins the one that is there.

    Raises ConfigError with every differing key if the run there is another one. Only the process with `is_writer` writes.
    """
    if (workdir / CONFIG).exists():
        run = load_run(workdir)
        problems = contradictions(run.config, config)
        if run.tokenizer.fingerprint != prepared.tokenizer.fingerprint:
            problems.append("data.tokenizer: the run was trained with another tokenizer")
        elif run.data_fingerprint != prepared.fingerprint:
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
        write_atomically(workdir / CONFIG, to_json(replace(config, parallel=alone, data=_absolute(config.data))))


def _absolute(data: DataConfig) -> dict[str, Any]:
    """Returns the keys that name files, so that they name the same files from any directory."""

    def absolute(name: str) -> str:
        kind, colon, path = name.partition(":") if name.startswith(("local_text:", "hf:")) else ("", "", name)
        if kind == "hf":
            return f"hf:{Path(path).expanduser().absolute()}" if Path(path).expanduser().exists() else name
        return kind + colon + str(Path(glob.escape(str(Path.cwd()))) / Path(path).expanduser())

    source = tuple(name if name.startswith(("python_stdlib", "tfds:")) else absolute(name) for name in data.source)
    tokenizer = str(Path(data.tokenizer_path).expanduser().absolute()) if data.tokenizer_path else ""
    paths = ("path", "source_path", "target_path", "validation_source_path", "validation_target_path")
    files = {name: tuple(map(absolute, getattr(data, name))) for name in paths}
    return files | {"source": source, "tokenizer_path": tokenizer}


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the run directory for one training at a time; raises ConfigError if another process has it."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{workdir} is in use by another process that trains there") from error
        yield


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

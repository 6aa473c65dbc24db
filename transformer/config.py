"""The configuration: frozen, typed dataclasses, and the only place where a default is written.

A recipe is a file `configs/NAME.py` with a function `get_config() -> Config`. The command line
overrides single keys (`transformer/arguments.py`); `validate` reports every mistake at once. This module
imports neither JAX nor any other heavy package, so that `--help` answers quickly.
"""

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")

VOCAB_ROW_MULTIPLE = 128
"""Rows of the embedding table are padded in memory to a multiple of this, so that every vocabulary splits."""

BYTE_VOCAB_SIZE = 4 + 256
"""Tokens of raw bytes: the special ones, and one for each byte."""

MESH_AXES = ("replica", "fsdp", "expert", "context", "tensor", "stage")
"""The axes of the one device mesh, outermost (slowest links) first."""


class ConfigError(ValueError):
    """A mistake of the user's: one line a problem, every problem of a configuration at once."""

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from, how it becomes tokens, and how tokens become batches."""

    source: tuple[str, ...] = ("python_stdlib",)
    """Text sources: `python_stdlib`, `tfds:NAME[/CONFIG]`, `hf:NAME_OR_FOLDER`, or `local_text:PATH_OR_GLOB`."""
    path: tuple[str, ...] = ()
    """Local files or globs (.txt, .md, .jsonl, .parquet, plain or .gz or .zst); when given they replace `source`."""
    weights: tuple[float, ...] = ()
    """Share of the examples drawn from each source; empty means in proportion to the number of their tokens."""
    text_field: str = "text"
    """Field of a .jsonl or .parquet record, or of a dataset's example, that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """What to do with bytes that are not UTF-8: stop and name them, or replace them by U+FFFD."""
    validation_documents: float = 0.02
    """Share of the documents held out for validation, chosen by a hash of each document's text."""
    validation_tail: float | None = None
    """Hold out this last part of each document's text instead; None: 0.1 if the corpus is a single document."""
    tokenizer: Literal["bpe", "unigram", "bytes", "characters", "huggingface"] = "bpe"
    """`bpe` and `unigram` are SentencePiece models; `huggingface` reads a tokenizer.json."""
    tokenizer_path: str = ""
    """Tokenizer file to load; empty: train one on the corpus (bytes and characters need no training)."""
    tokenizer_vocab_size: int = 4096
    """Number of tokens of a SentencePiece tokenizer trained on the corpus, its four special tokens included."""
    sequence_length: int = 256
    """Tokens in a training example (T)."""
    shift_windows: bool = True
    """Move the cuts between examples by a different number of tokens in every epoch after the first."""
    shuffle: bool = True
    """Visit the examples of each epoch in a random order that reaches over the whole corpus."""
    cache_dir: str = "~/.cache/transformer"
    """Where datasets, trained tokenizers and token shards are kept; shared by all runs."""
    num_workers: int = 0
    """Processes that tokenise in parallel; 0: one for each CPU core."""
    prefetch_batches: int = 4
    """Batches that are read ahead of the step."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer."""

    vocab_size: int | None = None
    """Number of tokens the model can tell apart (V); None: as many as the tokenizer has."""
    num_layers: int = 4
    """Blocks in the stack (L)."""
    width: int = 256
    """Width of the residual stream (D)."""
    num_heads: int = 4
    """Query heads (N)."""
    num_kv_heads: int | None = None
    """Key and value heads (K), each shared by N / K query heads; None: as many as query heads."""
    head_width: int | None = None
    """Width of a head (H); None: width / num_heads."""
    feedforward_width: int | None = None
    """Width of the hidden layer of the MLP (F); None: 4 * width, or 8/3 of it for gated activations, up to a 64th."""
    activation: Literal["gelu", "relu", "swiglu", "geglu"] = "gelu"
    """Feed-forward kind: an MLP with GELU (tanh form) or ReLU, or a gated one."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Normalisation: LayerNorm or RMSNorm."""
    norm_placement: Literal["pre", "post"] = "pre"
    """Normalise the input of each sublayer (pre), or the sum with the residual (post)."""
    norm_epsilon: float = 1e-5
    """Added to the variance (LayerNorm) or to the mean square (RMSNorm)."""
    biases: bool = False
    """Biases in linear layers and in LayerNorm."""
    positions: Literal["rotary", "learned", "sinusoidal"] = "rotary"
    """How the model is told the order of tokens."""
    num_positions: int | None = None
    """Rows of the table of learned positions; None: data.sequence_length."""
    rotary_base: float = 10_000.0
    """Base of the geometric series of rotary wavelengths."""
    tied_embeddings: bool = True
    """Use the embedding table as the output head too."""
    dropout: float = 0.0
    """Share of activations dropped: on the embedding and on each sublayer's output."""
    initial_scale: float = 0.02
    """Standard deviation of initial weights; those that write to the residual stream get 1 / sqrt(2 * num_layers) of it."""
    attention_implementation: Literal["reference", "causal_blocks"] | None = None
    """All pairs at once, or without the half above the diagonal in blocks, as suits a CPU; None: by platform."""
    scan_layers: bool | None = None
    """Compile one block and loop over it (fast to compile) or unroll all; None: unroll on CPU, loop elsewhere."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes: nothing, all but matrix products, or whole blocks."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of weights inside matrix products; parameters and softmax stay in float32."""

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads if self.head_width is None else self.head_width

    @property
    def gated(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def ff_width(self) -> int:
        if self.feedforward_width is not None:
            return self.feedforward_width
        return 64 * math.ceil(8 * self.width / 3 / 64) if self.gated else 4 * self.width

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table in memory: the vocabulary, padded."""
        assert self.vocab_size is not None, "the vocabulary is resolved before the model is built"
        return VOCAB_ROW_MULTIPLE * math.ceil(self.vocab_size / VOCAB_ROW_MULTIPLE)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    name: Literal["causal"] = "causal"
    """`causal`: each token from those before it."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function (PaLM used 1e-4), which keeps logits from drifting."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Learning rate after the warm-up; `wsd` (warm-up, stable, decay) is constant and then falls linearly."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly from 0."""
    warmup_tokens: int = 0
    """The same, in tokens of the global batch; give one of the two."""
    final_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak (cosine, linear, wsd)."""
    decay_share: float = 0.2
    """Share of the steps over which `wsd` decays."""
    beta1: float = 0.9
    """Decay of AdamW's first moment; momentum of sgd is separate."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to the root of AdamW's second moment."""
    momentum: float = 0.0
    """Momentum of sgd."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings (AdamW); biases and norms are never decayed."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; longer ones are scaled down to it. 0: no clipping."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    num_steps: int = 1000
    """Optimizer steps in the run."""
    batch_size: int = 16
    """Examples in the global batch (B), over all devices and microbatches."""
    num_microbatches: int = 1
    """Parts into which a step splits its batch to save memory; the gradient is that of the whole batch."""
    max_nonfinite_steps: int = 10
    """Steps with a non-finite gradient are skipped; this many in a row end the run."""
    log_every_steps: int = 10
    """Interval of lines on the console where there is no progress bar; metrics.jsonl has every step."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Validation and samples during training."""

    every_steps: int = 250
    """Steps between validations; the last step is always validated. 0: only the last."""
    num_batches: int = 0
    """Batches of the validation split to use; 0: the whole split."""
    batch_size: int | None = None
    """Examples in a validation batch; None: train.batch_size."""
    sample_prompt: str = "\n"
    """Prompt of the sample that is generated after each validation."""
    sample_tokens: int = 128
    """Length of that sample in tokens. 0: no sample."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    every_steps: int = 250
    """Steps between checkpoints; the last step and a signal always save. 0: only those."""
    keep_latest: int = 2
    """Newest checkpoints to keep."""
    keep_best: int = 1
    """Checkpoints with the lowest validation loss to keep as well, among those of steps that are validated."""
    keep_every_steps: int = 0
    """Keep every checkpoint whose step is a multiple of this as well. 0: none."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where metrics go besides metrics.jsonl and the console."""

    tensorboard: bool = True
    """Write TensorBoard events to the run directory."""
    wandb: bool = False
    """Log to Weights & Biases (extra `tracking`; offline with WANDB_MODE=offline)."""
    wandb_project: str = "transformer"
    """Project that Weights & Biases files the run under."""
    plot: bool = True
    """Draw loss.png in the run directory at each validation (extra `plots`)."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is split over devices. At most one axis may be -1: what the others leave."""

    replica: int = 1
    """Data-parallel copies of the parameters (slices of a pod, over slow links)."""
    fsdp: int = -1
    """Data parallelism with parameters and optimizer state split (ZeRO-3)."""
    tensor: int = 1
    """Heads, MLP and vocabulary split within each layer (Megatron)."""
    cpu_devices: int = 0
    """Simulate this many devices on the CPU. 0: the real devices."""
    coordinator: str = ""
    """HOST:PORT of process 0; empty: from Slurm, Kubernetes or the TPU runtime if they started several processes."""
    num_processes: int = 0
    """Number of processes; 0: found out from the environment."""
    process_id: int = -1
    """This process's number; -1: found out from the environment."""


@dataclass(frozen=True)
class ProfileConfig:
    """A trace of the live run, written to the run directory for TensorBoard or Perfetto."""

    start_step: int = 0
    """First traced step."""
    num_steps: int = 0
    """Steps to trace. 0: none."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    seed: int = 0
    """Seed of initialisation, data order and dropout."""
    compilation_cache_dir: str = "~/.cache/transformer/compilation"
    """Where XLA keeps compiled programs between runs; empty: nowhere."""


# Validation. Each check appends a sentence that names the key, its value and what is allowed.

_NOT_NEGATIVE = (
    "data.num_workers objective.z_loss optimizer.warmup_steps optimizer.warmup_tokens optimizer.weight_decay "
    "optimizer.clip_norm evaluation.every_steps evaluation.num_batches evaluation.sample_tokens "
    "checkpoint.every_steps checkpoint.keep_best checkpoint.keep_every_steps "
    "parallel.cpu_devices parallel.num_processes profile.start_step profile.num_steps seed"
).split()
_SHARES = (
    "data.validation_documents data.validation_tail model.dropout optimizer.final_ratio optimizer.decay_share "
    "optimizer.beta1 optimizer.beta2 optimizer.momentum"
).split()
_LEAST_OR_MINUS_ONE = {"parallel.replica": 1, "parallel.fsdp": 1, "parallel.tensor": 1, "parallel.process_id": 0}
_LARGEST = {"seed": 2**32 - 1, "train.num_steps": 2**31 - 1, "train.batch_size": 2**24}
_LARGEST |= {"data.sequence_length": 2**24, "model.width": 2**20, "model.num_layers": 2**14}
_AXIS_KEYS = ("replica", "fsdp", "tensor")


def get(config: Config, key: str) -> Any:
    """Returns the value at a dotted key such as `model.width`."""
    return functools.reduce(getattr, key.split("."), config)


def type_of(key: str) -> Any:
    """Returns the declared type of a dotted key."""
    kind: Any = Config
    for part in key.split("."):
        kind = {item.name: item.type for item in dataclasses.fields(kind)}[part]
    return kind


def keys(config_type: type = Config, prefix: str = "") -> tuple[str, ...]:
    """Returns every dotted key of the configuration, in order of declaration."""
    found: list[str] = []
    for item in dataclasses.fields(config_type):
        nested = dataclasses.is_dataclass(item.type)
        found += keys(typing.cast(type, item.type), f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return tuple(found)


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns ` (did you mean …?)` with the known spelling nearest to `word`, or nothing."""
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}
    word = word.replace("-", "_")
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    match = match or [leaves[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], list(leaves), n=1)]
    return f" (did you mean {match[0]}?)" if match else ""


def problems_of(config: Config) -> list[str]:
    """Returns every mistake in `config` that can be seen without looking at data or devices."""
    problems = list(_range_problems(config))
    wrong = {key for problem in problems for key in mentioned(problem)}
    across = [*_data_problems(config.data), *_model_problems(config), *_run_problems(config)]
    # What follows from a value that is impossible by itself is no mistake of its own.
    return problems + [problem for problem in across if not mentioned(problem) & wrong]


def mentioned(problem: str) -> set[str]:
    """Returns the keys that a sentence names."""
    return {key for key in keys() if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", problem)}


def _range_problems(config: Config) -> Iterator[str]:
    for key in keys():
        value = get(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} = {value}: must be a finite number"
        elif value is None or isinstance(value, str | bool | tuple):
            continue
        elif key in _NOT_NEGATIVE and value < 0:
            yield f"{key} = {value}: must not be negative"
        elif key in _SHARES and not (0 <= value < 1 or (key == "optimizer.final_ratio" and value == 1)):
            yield f"{key} = {value}: must be a share, at least 0 and below 1"
        elif value != -1 and value < _LEAST_OR_MINUS_ONE.get(key, value):
            yield f"{key} = {value}: must be at least {_LEAST_OR_MINUS_ONE[key]}, or -1"
        elif value <= 0 and key not in (*_NOT_NEGATIVE, *_SHARES, *_LEAST_OR_MINUS_ONE):
            yield f"{key} = {value}: must be greater than 0"
        elif value > _LARGEST.get(key, value):
            yield f"{key} = {value}: must be at most {_LARGEST[key]}"


def _data_problems(data: DataConfig) -> Iterator[str]:
    sources = ("python_stdlib", "local_text:PATH", "tfds:NAME", "hf:NAME")
    kinds = [source.partition(":")[0] for source in sources]
    if not (data.path or data.source):
        yield "data.source is empty: name at least one source, or give data.path"
    for source in () if data.path else data.source:
        kind, _, name = source.partition(":")
        if not (name if kind in kinds[1:] else source == "python_stdlib"):
            yield f"data.source = {source!r}: must be one of {', '.join(sources)}{nearest(kind, kinds)}"
    expected = 1 if data.path else len(data.source)
    if data.weights and len(data.weights) != expected:
        yield f"data.weights has {len(data.weights)} numbers for {expected} sources"
    if not all(0 < weight < math.inf for weight in data.weights):
        yield f"data.weights = {data.weights}: each must be a finite number greater than 0"
    if data.tokenizer == "huggingface" and not data.tokenizer_path:
        yield "data.tokenizer = 'huggingface' needs data.tokenizer_path, a tokenizer.json"
    if data.tokenizer in ("bytes", "characters") and data.tokenizer_path:
        yield f"data.tokenizer_path = {data.tokenizer_path!r}: {data.tokenizer} has no file"


def _model_problems(config: Config) -> Iterator[str]:
    model, heads = config.model, f"model.num_heads = {config.model.num_heads}"
    if model.num_heads > 0:
        if model.head_width is None and model.width % model.num_heads:
            yield f"model.width = {model.width} is not divisible by {heads}: change one, or set model.head_width"
        elif model.positions == "rotary" and model.head_dim % 2:
            odd = f"{model.head_dim} (model.head_width, or model.width / model.num_heads)"
            yield f"model.positions = 'rotary' needs an even head width, not {odd}"
        if model.kv_heads > 0 and model.num_heads % model.kv_heads:
            yield f"{heads} is not divisible by model.num_kv_heads = {model.kv_heads}"
    if model.positions == "sinusoidal" and model.width % 2:
        yield f"model.positions = 'sinusoidal' needs an even model.width, not {model.width}"
    tokens = known_vocab_size(config.data)
    if model.vocab_size is not None and tokens is not None and model.vocab_size < tokens:
        advice = "give at least that, or leave it out"
        yield f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokens} tokens: {advice}"
    length, rows = config.data.sequence_length, model.num_positions
    if model.positions == "learned" and rows is not None and rows < length:
        yield f"data.sequence_length = {length} is longer than model.num_positions = {rows}"


def _run_problems(config: Config) -> Iterator[str]:
    train, optimizer, parallel = config.train, config.optimizer, config.parallel
    total, warmup = f"train.num_steps = {train.num_steps}", warmup_steps(config)
    if optimizer.warmup_steps and optimizer.warmup_tokens:
        yield "optimizer.warmup_steps and optimizer.warmup_tokens are both set: give one"
    decay = round(optimizer.decay_share * train.num_steps) if 0 <= optimizer.decay_share < 1 else 0
    if 0 < train.num_steps < warmup:
        yield f"the warm-up of {warmup} steps (optimizer.warmup_steps, optimizer.warmup_tokens) is longer than {total}"
    elif optimizer.schedule == "wsd" and warmup + decay > train.num_steps:
        parts = f"the warm-up ({warmup} steps) and decay ({decay}, optimizer.decay_share) overlap in {total}"
        yield f"optimizer.schedule = 'wsd': {parts}"
    if train.num_microbatches > 0 and train.batch_size % train.num_microbatches:
        parts = f"train.num_microbatches = {train.num_microbatches}"
        yield f"train.batch_size = {train.batch_size} is not divisible by {parts}"
    elif min(parallel.replica, parallel.fsdp, train.num_microbatches) > 0:
        yield from _batch_problems(config, parallel.replica * parallel.fsdp)
    free = [f"parallel.{name}" for name in _AXIS_KEYS if getattr(parallel, name) == -1]
    if len(free) > 1:
        yield f"{' = '.join(free)} = -1: only one axis can be what the others leave"
    if parallel.coordinator and not re.fullmatch(r".+:\d+", parallel.coordinator):
        yield f"parallel.coordinator = {parallel.coordinator!r}: must be HOST:PORT"
    prompt = config.evaluation.sample_prompt
    if prompt != prompt.encode(errors="replace").decode():
        yield f"evaluation.sample_prompt = {prompt!r}: is not UTF-8"
    distributed = (bool(parallel.coordinator), parallel.num_processes > 0, parallel.process_id >= 0)
    if any(distributed) and not all(distributed):
        yield "parallel.coordinator, parallel.num_processes and parallel.process_id must be given together"
    elif all(distributed) and parallel.process_id >= parallel.num_processes:
        count = f"parallel.num_processes = {parallel.num_processes}"
        yield f"parallel.process_id = {parallel.process_id}: must be below {count}"


def mesh_problems(config: Config, num_devices: int) -> list[str]:
    """Returns what is wrong between the mesh, the batch and the number of devices."""
    axes = {name: getattr(config.parallel, name) for name in _AXIS_KEYS}
    fixed = math.prod(size for size in axes.values() if size != -1)
    wanted = " x ".join(f"parallel.{name} = {size}" for name, size in axes.items())
    free = -1 in axes.values()
    if num_devices % fixed if free else num_devices != fixed:
        devices = f"{num_devices} device{'s' * (num_devices != 1)}"
        return [f"{wanted} {'does not divide' if free else f'= {fixed} does not match'} the {devices} at hand"]
    sizes = mesh_axes(config, num_devices)
    return _batch_problems(config, sizes["replica"] * sizes["fsdp"])


def _batch_problems(config: Config, shards: int) -> list[str]:
    batches = {"train.batch_size / train.num_microbatches": config.train.batch_size // config.train.num_microbatches}
    if config.evaluation.batch_size is not None:
        batches["evaluation.batch_size"] = config.evaluation.batch_size
    devices = f"the {shards} data-parallel devices (parallel.replica x parallel.fsdp)"
    return [f"{key} = {size} is not divisible by {devices}" for key, size in batches.items() if size % shards]


def mesh_axes(config: Config, num_devices: int) -> dict[str, int]:
    """Returns the size of every mesh axis, in the mesh's order, with -1 replaced by what is left."""
    sizes = {axis: getattr(config.parallel, axis, 1) for axis in MESH_AXES}
    left = num_devices // math.prod(size for size in sizes.values() if size != -1)
    return {axis: left if size == -1 else size for axis, size in sizes.items()}


def known_vocab_size(data: DataConfig) -> int | None:
    """Returns the number of the tokenizer's tokens where it is known without the data, else None."""
    trained = data.tokenizer in ("bpe", "unigram") and not data.tokenizer_path
    return data.tokenizer_vocab_size if trained else BYTE_VOCAB_SIZE if data.tokenizer == "bytes" else None


def warmup_steps(config: Config) -> int:
    """Returns the length of the warm-up in steps, whichever way it is given."""
    tokens_per_step = max(1, config.train.batch_size * config.data.sequence_length)
    return config.optimizer.warmup_steps or math.ceil(config.optimizer.warmup_tokens / tokens_per_step)


def validate(config: Config, num_devices: int | None = None) -> Config:
    """Returns `config`, or raises one `ConfigError` that lists everything wrong with it."""
    if problems := problems_of(config) or (mesh_problems(config, num_devices) if num_devices is not None else []):
        raise ConfigError(problems)
    return config


def replace(config: Config, **changes: Any) -> Config:
    """Returns `config` with changes given as `model={"width": 128}, seed=1`: one level deep, like the tree."""
    nested = {
        name: dataclasses.replace(getattr(config, name), **change)
        if isinstance(change, dict) and hasattr(config, name)
        else change
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **nested)


# Reading and writing.


def to_json(config: Config) -> str:
    """Returns the configuration as indented JSON, every key included."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Reads what `to_json` wrote; missing keys take their defaults, unknown ones and wrong types are all reported."""
    try:
        config, problems = from_tree(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if problems:
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return config


def from_tree(tree: Any) -> tuple[Config, list[str]]:
    """Returns the configuration that nested dictionaries stand for, lists taken for tuples and whole numbers for
    floats where those are declared, and a sentence for each mistake in them; what is wrong takes its default."""
    problems: list[str] = []
    return _build(Config, tree, "", problems), problems


def _build(kind: type[T], tree: Any, prefix: str, problems: list[str]) -> T:
    if not isinstance(tree, dict):
        problems.append(f"{prefix.rstrip('.') or 'the configuration'} must be an object, not {tree!r}")
        return kind()
    fields = {item.name: item for item in dataclasses.fields(typing.cast(Any, kind))}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if name not in fields:
            problems.append(f"{prefix}{name} is not a key{nearest(prefix + name, keys())}")
        elif dataclasses.is_dataclass(expected := fields[name].type):
            values[name] = _build(typing.cast(type, expected), value, f"{prefix}{name}.", problems)
        else:
            value = _coerced(expected, value)
            if _accepts(expected, value):
                values[name] = value
            else:
                problems.append(type_problem(prefix + name, value, expected))
    return kind(**values)


def _coerced(expected: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        element = typing.get_args(expected)[0] if typing.get_origin(expected) is tuple else None
        return tuple(_coerced(element, item) for item in value)
    wants_float = expected is float or float in typing.get_args(expected)
    fits = type(value) is int and value.bit_length() < 1024
    return float(value) if wants_float and fits else value


def _accepts(expected: Any, value: Any) -> bool:
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(a, value) for a in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_accepts(arguments[0], v) for v in value)
    return type(value) is expected


def type_problem(key: str, value: Any, expected: Any) -> str:
    """Returns the sentence for a value that is not of the type `expected`."""
    choices = typing.get_args(expected) if typing.get_origin(expected) is Literal else ()
    return f"{key} = {value!r}: must be {type_name(expected)}{nearest(str(value), choices)}"


def type_name(expected: Any) -> str:
    """Returns a declared type in words."""
    arguments = typing.get_args(expected)
    if typing.get_origin(expected) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if typing.get_origin(expected) is tuple:
        return f"any number of values, each {type_name(arguments[0])}"
    if arguments:
        return " or ".join("None" if argument is types.NoneType else type_name(argument) for argument in arguments)
    return {bool: "True or False", int: "a whole number", float: "a number", str: "text"}[expected]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file whole or not at all: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise

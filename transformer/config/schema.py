"""The configuration: frozen, typed dataclasses, and the only place where a default is written.

A recipe is a file `configs/NAME.py` with a function `get_config() -> Config`. The command line
overrides single keys (`transformer/arguments.py`); `validate` reports every mistake at once. This module
imports neither JAX nor any other heavy package, so that `--help` answers quickly.
"""

import bisect
import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from transformer.config.adapter import AdapterConfig
from transformer.config.init_from import InitFromConfig
from transformer.config.model import ModelConfig

BYTE_VOCAB_SIZE = 4 + 256
"""Tokens of raw bytes: the special ones, and one for each byte."""

MESH_AXES = ("replica", "stage", "fsdp", "expert", "context", "tensor")
"""The axes of the one device mesh, outermost (slowest links) first."""
DATA_AXES = ("replica", "fsdp", "expert")
"""Those that the batch is split over."""

DataKind = Literal["text", "pairs", "labelled", "chat", "preferences"]

OBJECTIVE_DATA: dict[str, DataKind] = {
    "seq2seq": "pairs",
    "sequence_classification": "labelled",
    "token_classification": "labelled",
    "regression": "labelled",
    "span_extraction": "labelled",
    "text_to_text": "pairs",
    "chat": "chat",
    "dpo": "preferences",
}
"""What objectives need that do not learn from running text."""


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
    """Local files or globs (.txt, .md, .jsonl, .parquet, plain or .gz or .zst); when given they replace what else is named."""
    validation_path: tuple[str, ...] = ()
    """Local files or globs to validate on, with `path`; none: validation_documents of it are held out."""
    validation_split: str = ""
    """Split of a tfds: or hf: dataset to validate on; empty: validation_documents of its train split are held out."""
    weights: tuple[float, ...] = ()
    """Share of the examples drawn from each source; empty means in proportion to the number of their tokens."""
    text_field: str = "text"
    """Field of a .jsonl or .parquet record, or of a dataset's example, that holds the text."""
    source_path: tuple[str, ...] = ()
    """Texts to read for pairs, a line each: with target_path, which has as many lines, they replace `source`."""
    target_path: tuple[str, ...] = ()
    """Texts to write for pairs, a line each."""
    validation_source_path: tuple[str, ...] = ()
    """Held-out texts to read; none: validation_documents of the pairs are held out."""
    validation_target_path: tuple[str, ...] = ()
    """Held-out texts to write."""
    source_field: str = "source"
    """Field of a record that holds the text to read, for pairs."""
    target_field: str = "target"
    """Field of a record that holds the text to write, for pairs."""
    second_text_field: str = ""
    """Field of a text that is read after the first: a hypothesis, or the passage that a question is about. Empty: none."""
    source_prefix: str = ""
    """Words in front of every text to read, which tell the task (`text_to_text`)."""
    label_field: str = "label"
    """Field of a record that holds its class, a list with the class of each word, its number, or its answers."""
    label_words: tuple[str, ...] = ()
    """What is written for each label, VALUE=WORD (`text_to_text`); none: the target field holds text."""
    chat_field: str = ""
    """Field of a record that holds a conversation; empty: `messages`, or ShareGPT's `conversations`."""
    chat_template: str = ""
    """Jinja template of conversations: `plain`, `chatml`, `llama3`, a file, or the text itself; empty: that of the tokenizer."""
    overlong_chats: Literal["cut", "drop"] = "cut"
    """What becomes of a conversation that is longer than a row: it ends with the last answer that fits, or is left out."""
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
    """Tokens in a training example (T); of the target in an encoder-decoder."""
    source_length: int | None = None
    """Tokens that an encoder-decoder reads (S); None: sequence_length."""
    window_length: int | None = None
    """Tokens of text from which an example is made; None: what the objective needs to fill the lengths."""
    shift_windows: bool = True
    """Move the cuts between examples by a different number of tokens in every epoch after the first."""
    shuffle: bool = True
    """Visit the examples of each epoch in a random order that reaches over the whole corpus."""
    cache_dir: str = "~/.cache/transformer"
    """Where datasets, trained tokenizers and token shards are kept; shared by all runs."""
    prepared: str = ""
    """Directory, gs:// and s3:// too, that `transformer prepare --publish` has made: read instead of `source` and the like."""
    copy_prepared: bool | None = None
    """Copy its shards to the cache of each machine; None: only where they cannot be read in place, on s3://."""
    num_workers: int = 0
    """Processes that tokenise in parallel; 0: one for each CPU core."""
    prefetch_batches: int = 4
    """Batches that are read ahead of the step."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the model learns to predict."""

    name: Literal[
        "causal",
        "prefix_lm",
        "fill_in_the_middle",
        "multi_token",
        "masked_lm",
        "span_corruption",
        "mixture_of_denoisers",
        "seq2seq",
        "sequence_classification",
        "token_classification",
        "regression",
        "span_extraction",
        "text_to_text",
        "associative_recall",
        "chat",
        "dpo",
    ] = "causal"
    """`causal`: each token from those before it; `transformer.objectives` has the table of all."""
    z_loss: float = 0.0
    """Weight of the squared log-partition function (PaLM used 1e-4), which keeps logits from drifting."""
    label_smoothing: float = 0.0
    """Probability that the target distribution spreads evenly over the vocabulary; for `dpo`, that a preference is wrong."""
    logit_chunk: int = 0
    """Tokens of a text whose logits exist at one time: less memory, a product more for the gradient. 0: all."""
    mask_rate: float = 0.15
    """Share of the tokens that `masked_lm` asks for and `span_corruption` removes."""
    whole_words: bool = False
    """Choose whole words (`masked_lm`)."""
    mask_token: int | None = None
    """Token in the place of those that `masked_lm` asks for, such as a tokenizer's own; None: one after the tokenizer's."""
    mean_span_length: float = 3.0
    """Mean number of tokens of a removed span (`span_corruption`)."""
    middle_rate: float = 0.5
    """Share of the documents that `fill_in_the_middle` takes apart."""
    suffix_first_rate: float = 0.5
    """Share of those in the order suffix, prefix, middle; the others have the prefix first."""
    future_weight: float = 0.3
    """Weight of the loss of tokens beyond the next (`multi_token`)."""
    pooling: Literal["auto", "first", "last", "mean"] = "auto"
    """Where a text's class or number is told: at its first token, its last, or by the mean of all; auto: where all is seen."""
    max_answer_length: int = 30
    """Most tokens of an answer that is looked for (`span_extraction`)."""
    num_pairs: int = 16
    """Most keys that an example has, whose values are asked for (`associative_recall`)."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Loss of the margin by which the preferred answer has become more probable than the other (`dpo`)."""
    dpo_beta: float = 0.1
    """Factor of that margin: the higher, the closer the model stays to the one it began as (`dpo`)."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become updates."""

    name: Literal["adamw", "adafactor", "lion", "sgd", "muon", "schedule_free"] = "adamw"
    """Optimizer; `schedule_free` is AdamW with averaging in the place of a schedule, which must be `constant`."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """Learning rate after the warm-up; `wsd` is constant and then falls linearly, `inverse_sqrt` falls forever."""
    warmup_steps: int = 0
    """Steps over which the learning rate grows linearly from 0."""
    warmup_tokens: int = 0
    """The same, in tokens of the global batch; give one of the two."""
    final_ratio: float = 0.1
    """Learning rate at the last step, as a share of the peak (cosine, linear, wsd)."""
    decay_share: float = 0.2
    """Share of the steps over which `wsd` decays."""
    beta1: float = 0.9
    """Decay of the first moment (adamw, muon's Adam, lion); weight of the average where schedule_free is differentiated."""
    beta2: float = 0.95
    """Decay of the second moment (adamw, muon's Adam, schedule_free), of the only one of lion."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    momentum: float = 0.0
    """Momentum of sgd."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices, embeddings and head (all but sgd); biases and norms are never decayed."""
    clip_norm: float = 1.0
    """Largest global norm of a gradient; longer ones are scaled down to it. 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which then is what is evaluated and kept. 0: no average."""
    muon_momentum: float = 0.95
    """Momentum of Muon."""
    matrix_rate: float = 1.0
    """Multiplies the learning rate of matrices inside the layers."""
    embedding_rate: float = 1.0
    """Multiplies the learning rate of embeddings."""
    head_rate: float = 1.0
    """Multiplies the learning rate of the output head where it is not the embedding."""
    vector_rate: float = 1.0
    """Multiplies the learning rate of norms, biases and other vectors."""
    depth_rate: float = 1.0
    """Multiplies the learning rate once for each layer below the top one of its stack, embeddings being below the first."""
    frozen: tuple[str, ...] = ()
    """Parameters that are not trained, as patterns: encoder/*, or re: and a regular expression."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    num_steps: int = 1000
    """Optimizer steps in the run."""
    batch_size: int = 16
    """Examples in the global batch (B), over all devices and microbatches."""
    num_microbatches: int = 1
    """Parts into which a step splits its batch to save memory; the gradient is that of the whole batch."""
    batch_warmup_steps: int = 0
    """Steps over which the batch grows, a microbatch at a time, from one of them to num_microbatches."""
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
    expert: int = 1
    """Experts split; the batch is split over this axis too, and tokens travel to their experts and back."""
    context: int = 1
    """The length of every text split."""
    tensor: int = 1
    """Heads, MLP and vocabulary split within each layer (Megatron)."""
    stage: int = 1
    """Layers split, one after another: a pipeline through which microbatches pass."""
    sequence_sharding: bool = False
    """Split the residual stream's length over `tensor` too: norms and dropout work on a part (Korthikanti et al. 2022)."""
    shard_optimizer: bool = False
    """Split the optimizer's moments and the update over `replica` too, which keeps whole parameters (ZeRO-1)."""
    rules: tuple[str, ...] = ()
    """Which mesh axes split what, each NAME=AXIS,AXIS (nothing after =: whole), instead of the table `describe` prints."""
    schedule: Literal["gpipe", "1f1b", "interleaved"] = "1f1b"
    """Order in which stages compute: all forward and then all back, back as soon as may be, or the same in several rounds."""
    rounds: int = 1
    """Times that a microbatch passes through all stages, each with as many groups of layers (interleaved)."""
    offload_optimizer: bool = False
    """Keep the optimizer's moments in the host's memory: less on each device, and a transfer both ways in every step."""
    cpu_devices: int = 0
    """Simulate this many devices on the CPU. 0: the real devices."""
    coordinator: str = ""
    """HOST:PORT of process 0; empty: from Slurm, Kubernetes or the TPU runtime if they started several processes."""
    num_processes: int = 0
    """Number of processes; 0: found out from the environment."""
    process_id: int = -1
    """This process's number; -1: found out from the environment."""
    heartbeat_seconds: int = 100
    """A process that is not heard of for so long is lost, and the others end."""
    watchdog_seconds: int = 1800
    """Once the first step is done, a process in which nothing happens for so long writes its stacks and ends. 0: never."""


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
    init_from: InitFromConfig = field(default_factory=InitFromConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
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


def replace(config: Config, **changes: Any) -> Config:
    """Returns `config` with changes given as `model={"width": 128}, seed=1`: one level deep, like the tree."""
    nested = {
        name: dataclasses.replace(getattr(config, name), **change)
        if isinstance(change, dict) and hasattr(config, name)
        else change
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **nested)


def mesh_axes(config: Config, num_devices: int) -> dict[str, int]:
    """Returns the size of every mesh axis, in the mesh's order, with -1 replaced by what is left."""
    sizes = {axis: getattr(config.parallel, axis, 1) for axis in MESH_AXES}
    left = num_devices // math.prod(size for size in sizes.values() if size != -1)
    return {axis: left if size == -1 else size for axis, size in sizes.items()}


def data_kind(config: Config) -> DataKind:
    """Returns what the objective makes its examples from: windows of text, pairs of texts, or texts with labels."""
    return OBJECTIVE_DATA.get(config.objective.name, "text")


def source_length(config: Config) -> int:
    """Returns the length S of what an encoder-decoder reads."""
    return config.data.source_length or config.data.sequence_length


def window_length(config: Config) -> int:
    """Returns how many tokens of text an example is made from, where the objective has not said otherwise."""
    return config.data.window_length or config.data.sequence_length


def known_vocab_size(data: DataConfig) -> int | None:
    """Returns the number of the tokenizer's tokens where it is known without the data, else None."""
    trained = data.tokenizer in ("bpe", "unigram") and not data.tokenizer_path
    return data.tokenizer_vocab_size if trained else BYTE_VOCAB_SIZE if data.tokenizer == "bytes" else None


def microbatch_starts(config: Config) -> tuple[int, ...]:
    """Returns for each microbatch the first step, counted from 0, whose batch has it.

    All but the first come in evenly over `train.batch_warmup_steps`, so that the batch grows linearly.
    """
    parts, warmup = config.train.num_microbatches, config.train.batch_warmup_steps
    return tuple(-(-part * warmup // max(1, parts - 1)) for part in range(parts))


def num_microbatches(config: Config, step: int) -> int:
    """Returns how many microbatches the batch of a step, counted from 0, has."""
    return sum(step >= start for start in microbatch_starts(config))


def first_example(config: Config, step: int) -> int:
    """Returns how many examples the batches before that of a step, counted from 0, have."""
    size = config.train.batch_size // config.train.num_microbatches
    return size * sum(max(0, step - start) for start in microbatch_starts(config))


def warmup_steps(config: Config) -> int:
    """Returns the length of the learning rate's warm-up in steps, whichever way it is given."""
    examples = -(-config.optimizer.warmup_tokens // max(1, config.data.sequence_length))
    if config.optimizer.warmup_steps or not 0 < config.train.num_microbatches <= config.train.batch_size:
        return config.optimizer.warmup_steps
    longest = range(min(examples, 2**31))
    return bisect.bisect_left(longest, examples, key=lambda steps: first_example(config, steps))

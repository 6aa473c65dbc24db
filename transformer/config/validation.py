"""What can be wrong with a configuration: each check appends a sentence that names the key, its value and what is allowed."""

import importlib
import math
import re
from collections.abc import Iterator
from typing import get_args

from transformer.config.adapter import AdapterConfig
from transformer.config.init_from import InitFromConfig
from transformer.config.model import RECURRENT, FeedForwardKind, Mixer, ModelConfig, Pattern, parse_layers
from transformer.config.schema import (
    DATA_AXES,
    MESH_AXES,
    Config,
    ConfigError,
    DataConfig,
    data_kind,
    get,
    keys,
    known_vocab_size,
    nearest,
    source_length,
    warmup_steps,
)

_NOT_NEGATIVE = (
    "data.num_workers objective.z_loss optimizer.warmup_steps optimizer.warmup_tokens optimizer.weight_decay "
    "optimizer.clip_norm evaluation.every_steps evaluation.num_batches evaluation.sample_tokens "
    "checkpoint.every_steps checkpoint.keep_best checkpoint.keep_every_steps "
    "parallel.cpu_devices parallel.num_processes parallel.watchdog_seconds profile.start_step profile.num_steps seed objective.future_weight "
    "model.num_labels model.attention_soft_cap model.logit_soft_cap model.num_sinks model.num_future_tokens "
    "model.num_global_blocks model.num_random_blocks train.batch_warmup_steps model.balance_bias_rate "
    "optimizer.matrix_rate optimizer.embedding_rate optimizer.head_rate optimizer.vector_rate "
    "model.num_token_types model.decoder_start_token objective.mask_token model.num_shared_experts model.balance_loss "
    "model.router_z_loss objective.logit_chunk init_from.step"
).split()
_SHARES = (
    "data.validation_documents data.validation_tail model.dropout adapter.dropout optimizer.final_ratio optimizer.decay_share "
    "optimizer.beta1 optimizer.beta2 optimizer.momentum optimizer.ema_decay optimizer.muon_momentum "
    "objective.label_smoothing objective.mask_rate objective.middle_rate objective.suffix_first_rate model.rotary_share"
).split()
_MAY_BE_ONE = ("optimizer.final_ratio", "objective.middle_rate", "objective.suffix_first_rate", "model.rotary_share")
_LEAST_OR_MINUS_ONE = {**{f"parallel.{axis}": 1 for axis in MESH_AXES}, "parallel.process_id": 0}
_LARGEST = {"seed": 2**32 - 1, "train.num_steps": 2**31 - 1, "train.batch_size": 2**24}
_LARGEST |= {"data.sequence_length": 2**24, "model.width": 2**20, "model.num_layers": 2**14, "optimizer.depth_rate": 1}


def problems_of(config: Config, platform: str | None = None) -> list[str]:
    """Returns every mistake in `config` that can be seen without looking at data or devices, but for their `platform`."""
    problems = list(_range_problems(config))
    wrong = {key for problem in problems for key in mentioned(problem)}
    across = [
        *_data_problems(config.data),
        *_example_problems(config),
        *_model_problems(config, platform),
        *_run_problems(config),
    ]
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
        elif key in _SHARES and not (0 <= value < 1 or (key in _MAY_BE_ONE and value == 1)):
            yield f"{key} = {value}: must be a share, at least 0 and {'at most' if key in _MAY_BE_ONE else 'below'} 1"
        elif value != -1 and value < _LEAST_OR_MINUS_ONE.get(key, value):
            yield f"{key} = {value}: must be at least {_LEAST_OR_MINUS_ONE[key]}, or -1"
        elif value <= 0 and key not in (*_NOT_NEGATIVE, *_SHARES, *_LEAST_OR_MINUS_ONE):
            yield f"{key} = {value}: must be greater than 0"
        elif value > _LARGEST.get(key, value):
            yield f"{key} = {value}: must be at most {_LARGEST[key]}"


def _data_problems(data: DataConfig) -> Iterator[str]:
    sources = ("python_stdlib", "local_text:PATH", "tfds:NAME", "hf:NAME")
    kinds = [source.partition(":")[0] for source in sources]
    if not (data.path or data.source_path or data.source):
        yield "data.source is empty: name at least one source, or give data.path"
    for source in () if data.path or data.source_path else data.source:
        kind, _, name = source.partition(":")
        if not (name if kind in kinds[1:] else source == "python_stdlib"):
            yield f"data.source = {source!r}: must be one of {', '.join(sources)}{nearest(kind, kinds)}"
    expected = 1 if data.path or data.source_path else len(data.source)
    if data.weights and len(data.weights) != expected:
        yield f"data.weights has {len(data.weights)} numbers for {expected} sources"
    if not all(0 < weight < math.inf for weight in data.weights):
        yield f"data.weights = {data.weights}: each must be a finite number greater than 0"
    if data.tokenizer == "huggingface" and not data.tokenizer_path:
        yield "data.tokenizer = 'huggingface' needs data.tokenizer_path, a tokenizer.json"
    if data.tokenizer == "bytes" and data.tokenizer_path:
        yield f"data.tokenizer_path = {data.tokenizer_path!r}: {data.tokenizer} has no file"


ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "causal": ("decoder",),
    "prefix_lm": ("decoder",),
    "fill_in_the_middle": ("decoder",),
    "multi_token": ("decoder",),
    "masked_lm": ("encoder",),
    "span_corruption": ("encoder_decoder",),
    "mixture_of_denoisers": ("encoder_decoder",),
    "seq2seq": ("encoder_decoder",),
    "sequence_classification": ("encoder", "decoder"),
    "token_classification": ("encoder", "decoder"),
    "regression": ("encoder", "decoder"),
    "span_extraction": ("encoder", "decoder"),
    "text_to_text": ("encoder_decoder",),
    "associative_recall": ("decoder",),
    "chat": ("decoder",),
    "dpo": ("decoder",),
}
"""What can learn each objective: who must predict a token may not see it, and who reads another text needs an encoder."""


def _example_problems(config: Config) -> Iterator[str]:
    """What the objective learns from, and where that comes from."""
    data, model, kind = config.data, config.model, data_kind(config)
    name = f"objective.name = {config.objective.name!r}"
    paths = (data.source_path, data.target_path, data.validation_source_path, data.validation_target_path)
    if kind != "text" or any(paths):
        yield from importlib.import_module("transformer.config.kinds").source_problems(data, kind, name)
    if model.architecture not in (fitting := ARCHITECTURES[config.objective.name]):
        yield f"model.architecture = {model.architecture!r}: {name} needs {' or '.join(map(repr, fitting))}"
    if (config.objective.name == "multi_token") != (model.num_future_tokens > 0):
        heads = f"model.num_future_tokens = {model.num_future_tokens}"
        yield f"{heads}: objective.name = 'multi_token' needs at least 1, the others 0, and this is {name}"
    yield from importlib.import_module("transformer.config.tasks").task_problems(config, kind, name)
    if config.objective.name == "dpo":
        yield from importlib.import_module("transformer.config.kinds").preference_problems(config)
    if config.objective.name == "associative_recall":
        yield from importlib.import_module("transformer.config.kinds").recall_problems(config)
    length, rows = source_length(config), model.num_positions
    if model.positions == "learned" and kind == "pairs" and rows is not None and rows < length:
        yield f"data.source_length = {length} is longer than model.num_positions = {rows}"


def _model_problems(config: Config, platform: str | None) -> Iterator[str]:
    model, heads = config.model, f"model.num_heads = {config.model.num_heads}"
    own, encoder = _mixers(model)
    if (own | encoder) & set(RECURRENT) or model.cross_attention != "attention":
        yield from importlib.import_module("transformer.config.kinds").recurrent_problems(model, own, encoder)
    reads = model.architecture == "encoder_decoder" and model.cross_attention == "attention"
    if model.num_heads > 0 and (reads or not own or not own | encoder <= set(RECURRENT)):
        if model.head_width is None and model.width % model.num_heads:
            yield f"model.width = {model.width} is not divisible by {heads}: change one, or set model.head_width"
        elif model.positions == "rotary" and model.head_dim % 2:
            odd = f"{model.head_dim} (model.head_width, or model.width / model.num_heads)"
            yield f"model.positions = 'rotary' needs an even head width, not {odd}"
        if model.kv_heads > 0 and model.num_heads % model.kv_heads:
            yield f"{heads} is not divisible by model.num_kv_heads = {model.kv_heads}"
    if model.positions == "sinusoidal" and model.width % 2:
        yield f"model.positions = 'sinusoidal' needs an even model.width, not {model.width}"
    if model.positions == "relative":
        yield from importlib.import_module("transformer.config.kinds").bucket_problems(model)
    if model.matrix_products != "compute_dtype":
        yield from importlib.import_module("transformer.config.kinds").eight_bit_problems(model)
    if model.remat in ("names", "offload"):
        yield from importlib.import_module("transformer.config.kinds").remat_problems(model)
    if model.rotary_scaling == "dynamic_ntk":
        yield from importlib.import_module("transformer.config.kinds").scaling_problems(config)
    own_keys = (model.window_rotary_base, model.rotary_attention_factor, model.attention_biases)
    if any(own_keys) or "@none" in f"{model.first_layers} {model.layers} {model.encoder_layers}":
        yield from importlib.import_module("transformer.config.kinds").attention_problems(model)
    if model.embedding_norm or model.head_transform or model.num_token_types or model.decoder_start_token is not None:
        yield from importlib.import_module("transformer.config.kinds").head_problems(model)
    yield from _layer_problems(config)
    if model.attention_implementation != "auto":
        yield from importlib.import_module("transformer.config.implementations").problems_of_attention(config, platform)
    tokens = known_vocab_size(config.data)
    if model.vocab_size is not None and tokens is not None and model.vocab_size < tokens:
        advice = "give at least that, or leave it out"
        yield f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokens} tokens: {advice}"
    length, rows = config.data.sequence_length, model.num_positions
    if model.positions == "learned" and rows is not None and rows < length:
        yield f"data.sequence_length = {length} is longer than model.num_positions = {rows}"


def _mixers(model: ModelConfig) -> tuple[set[str], set[str]]:
    """Returns the mixers of the stack and of its encoder, or of itself; none of a pattern that cannot be read."""
    try:
        own = {kind.mixer for kind in (*model.first_kinds, *model.kinds)}
        return own, own if model.architecture == "encoder" else {kind.mixer for kind in model.encoder_kinds}
    except ValueError:
        return set(), set()


def _layer_problems(config: Config) -> Iterator[str]:
    """What is wrong with the patterns of layers."""
    model, num_first = config.model, 0
    depths = {"first_layers": {}} if model.first_layers is not None else {}
    depths |= {"layers": {"num_layers": model.num_layers}}
    if model.architecture == "encoder_decoder":
        key = "layers" if model.encoder_layers is None else "encoder_layers"
        depths.setdefault(key, {})["num_encoder_layers"] = model.encoder_depth
    for key, stacks in depths.items():
        label = f"model.{key} = {getattr(model, key)!r}"
        try:
            kinds = parse_layers(getattr(model, key))
        except ValueError as error:
            yield f"{label}: {error}"
            continue
        for kind in dict.fromkeys(kinds):
            for what, name, known in (
                ("mixer", kind.mixer, get_args(Mixer)),
                ("pattern", kind.pattern, get_args(Pattern)),
                ("feed-forward kind", kind.feedforward, get_args(FeedForwardKind)),
            ):
                if name not in known:
                    yield f"{label}: {name!r} is not a {what}, which are {', '.join(known)}{nearest(name, known)}"
        if any(kind.pattern == "block_sparse" for kind in kinds) and model.num_window_blocks % 2 == 0:
            yield f"model.num_window_blocks = {model.num_window_blocks}: must be odd, a block and as many on either side"
        if any(kind.mixer != "attention" or kind.feedforward == "experts" for kind in kinds):
            is_encoder = model.architecture == "encoder" or "num_encoder_layers" in stacks
            is_decoder = key != "encoder_layers" and model.has_decoder
            rules = importlib.import_module("transformer.config.kinds")
            yield from rules.problems_of_kinds(config, label, kinds, is_encoder, is_decoder)
        num_first = len(kinds) if key == "first_layers" else num_first
        for name, depth in stacks.items():
            first = num_first if name == "num_layers" else 0
            after = f" after the {first} of model.first_layers = {model.first_layers!r}" if first else ""
            if first and 0 < depth <= first:
                yield f"model.{name} = {depth} leaves no layer for {label}{after}"
            elif depth > 0 and (depth - first) % len(kinds):
                yield f"{label} is a period of {len(kinds)} layers, which does not divide model.{name} = {depth}{after}"


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
    yield from _optimizer_problems(config)
    if config.init_from != InitFromConfig():
        yield from importlib.import_module("transformer.config.starts").start_problems(config)
    if config.adapter != AdapterConfig():
        yield from importlib.import_module("transformer.config.adapters").problems_of_adapters(config)
    if parallel.stage != 1 or parallel.rounds != 1:
        yield from importlib.import_module("transformer.config.pipelines").problems_of_stages(config)
    if train.batch_warmup_steps > max(0, train.num_steps):
        yield f"train.batch_warmup_steps = {train.batch_warmup_steps} is longer than {total}"
    elif train.batch_warmup_steps and train.num_microbatches == 1:
        parts = "train.num_microbatches = 1: the batch grows by whole microbatches"
        yield f"train.batch_warmup_steps = {train.batch_warmup_steps} needs more than {parts}"
    if train.num_microbatches > 0 and train.batch_size % train.num_microbatches:
        parts = f"train.num_microbatches = {train.num_microbatches}"
        yield f"train.batch_size = {train.batch_size} is not divisible by {parts}"
    elif min(shards := [getattr(parallel, axis) for axis in DATA_AXES]) > 0 and train.num_microbatches > 0:
        yield from importlib.import_module("transformer.config.splits").batch_problems(config, math.prod(shards))
    free = [f"parallel.{name}" for name in MESH_AXES if getattr(parallel, name) == -1]
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


def _optimizer_problems(config: Config) -> Iterator[str]:
    optimizer, name = config.optimizer, f"optimizer.name = {config.optimizer.name!r}"
    if optimizer.name == "sgd" and config.model.parametrization == "mup":
        yield f"{name} has no learning rates that follow the width: model.parametrization = 'mup' needs another"
    apart = [key for key in ("offload_optimizer", "shard_optimizer") if getattr(config.parallel, key)]
    for key in apart if optimizer.ema_decay or optimizer.name == "schedule_free" else ():
        average = name if optimizer.name == "schedule_free" else f"optimizer.ema_decay = {optimizer.ema_decay}"
        yield f"parallel.{key} = True: {average} keeps an average that is evaluated as the parameters are"
    if optimizer.frozen:
        yield from importlib.import_module("transformer.config.starts").frozen_problems(config)
    if optimizer.name == "schedule_free":
        yield from importlib.import_module("transformer.config.kinds").schedule_free_problems(optimizer)


def mesh_problems(config: Config, num_devices: int) -> list[str]:
    """Returns what is wrong between the mesh, what it splits and the number of devices."""
    return importlib.import_module("transformer.config.splits").mesh_problems(config, num_devices)


def validate(config: Config, num_devices: int | None = None, platform: str | None = None) -> Config:
    """Returns `config`, or raises one `ConfigError` that lists everything wrong with it."""
    found = problems_of(config, platform)
    if problems := found or (mesh_problems(config, num_devices) if num_devices is not None else []):
        raise ConfigError(problems)
    return config

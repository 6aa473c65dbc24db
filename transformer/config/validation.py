"""What can be wrong with a configuration: each check appends a sentence that names the key, its value and what is allowed."""

import importlib
import math
import re
from collections.abc import Iterator

from transformer.config.adapter import AdapterConfig
from transformer.config.init_from import InitFromConfig
from transformer.config.schema import (
    DATA_AXES,
    MESH_AXES,
    Config,
    ConfigError,
    get,
    keys,
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
    # Loaded by name, as are the rules for what few configurations have.
    examples, networks = (importlib.import_module(f"transformer.config.{name}") for name in ("examples", "networks"))
    across = [
        *examples.data_problems(config.data),
        *examples.example_problems(config),
        *networks.model_problems(config, platform),
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

"""Meshes that do not fit the devices, and splits that do not divide what they split: one rule an axis.

What is left whole where it does not divide (vocabulary, widths over fsdp, fewer key heads than `tensor`) is no mistake: every
device then holds all of it, computes the same, and `transformer describe` says so.
"""

import math
from collections.abc import Callable, Iterator, Mapping

from transformer.config.context import context_problems
from transformer.config.model import LayerKind
from transformer.config.schema import DATA_AXES, MESH_AXES, Config, mesh_axes, source_length

Sizes = Mapping[str, int]


def mesh_problems(config: Config, num_devices: int) -> list[str]:
    """Returns what is wrong between the mesh, what it splits and the number of devices."""
    axes = {name: getattr(config.parallel, name) for name in MESH_AXES}
    fixed = math.prod(size for size in axes.values() if size != -1)
    wanted = " x ".join(f"parallel.{name} = {size}" for name, size in axes.items())
    free = -1 in axes.values()
    if num_devices % fixed if free else num_devices != fixed:
        devices = f"{num_devices} device{'s' * (num_devices != 1)}"
        return [f"{wanted} {'does not divide' if free else f'= {fixed} does not match'} the {devices} at hand"]
    sizes = mesh_axes(config, num_devices)
    shards = math.prod(sizes[axis] for axis in DATA_AXES)
    return batch_problems(config, shards) + problems_of_splits(config, sizes)


def batch_problems(config: Config, shards: int) -> list[str]:
    """Returns a sentence for each batch that `shards` data-parallel devices do not divide."""
    batches = {"train.batch_size / train.num_microbatches": config.train.batch_size // config.train.num_microbatches}
    if config.evaluation.batch_size is not None:
        batches["evaluation.batch_size"] = config.evaluation.batch_size
    axes = " x ".join(f"parallel.{axis}" for axis in DATA_AXES)
    devices = f"the {shards} data-parallel devices ({axes})"
    return [f"{key} = {size} is not divisible by {devices}" for key, size in batches.items() if size % shards]


def problems_of_splits(config: Config, sizes: Sizes) -> list[str]:
    """Returns a sentence for each split of a mesh with these sizes that does not divide what it splits."""
    return [
        problem
        for axis, rule in RULES.items()
        if sizes[axis] > 1
        for problem in rule(config, f"parallel.{axis} = {sizes[axis]}", sizes)
    ]


def _kinds(config: Config) -> set[LayerKind]:
    model = config.model
    return {*model.first_kinds, *model.kinds, *(model.encoder_kinds if model.architecture == "encoder_decoder" else ())}


def _is_ruled(config: Config, name: str) -> bool:
    """Returns whether the user has a rule of his own for a logical name, which need not be split as ours says."""
    return any(rule.partition("=")[0].strip() == name for rule in config.parallel.rules)


def _tensor(config: Config, split: str, sizes: Sizes) -> Iterator[str]:
    model, kinds = config.model, _kinds(config)
    reads = model.architecture == "encoder_decoder" and model.cross_attention == "attention"
    has_heads = reads or any(kind.mixer not in ("lstm", "gru", "mingru") for kind in kinds)
    widths = {
        ("heads", f"model.num_heads = {model.num_heads}"): (has_heads, model.num_heads),
        ("mlp", f"model.feedforward_width = {model.ff_width}"): (
            any(kind.feedforward == "dense" for kind in kinds),
            model.ff_width,
        ),
        ("mlp", f"model.expert_width = {model.expert_dim}"): (
            any(kind.feedforward == "experts" for kind in kinds),
            model.expert_dim,
        ),
    }
    for (name, label), (exists, size) in widths.items():
        if exists and size % sizes["tensor"] and not _is_ruled(config, name):
            yield f"{label} is not divisible by {split}"
    if config.parallel.sequence_sharding:
        yield from _lengths(config, sizes["context"] * sizes["tensor"], "parallel.context x parallel.tensor")


def _expert(config: Config, split: str, sizes: Sizes) -> Iterator[str]:
    model = config.model
    if not any(kind.feedforward == "experts" for kind in _kinds(config)):
        advice = "parallel.fsdp and parallel.replica split the batch as well"
        yield f"{split}: model.layers = {model.layers!r} has no experts; {advice}"
    elif model.num_experts % sizes["expert"] and not _is_ruled(config, "experts"):
        yield f"model.num_experts = {model.num_experts} is not divisible by {split}"


def _lengths(config: Config, parts: int, split: str) -> Iterator[str]:
    lengths = {"sequence_length": config.data.sequence_length}
    if config.model.architecture == "encoder_decoder":
        lengths["source_length"] = source_length(config)
    for key, length in lengths.items():
        if length % parts:
            yield f"data.{key} = {length} is not divisible by {split} = {parts}"


RULES: dict[str, Callable[[Config, str, Sizes], Iterator[str]]] = {
    "tensor": _tensor,
    "expert": _expert,
    "context": context_problems,
}

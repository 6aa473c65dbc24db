"""Bytes and seconds of a step by arithmetic alone, in milliseconds and without a compiler: what the search rules out by, and
what the changes are weighed with that make a plan fit.

It is coarser than what the compiler says, which always has the last word.
"""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

from transformer.config import DATA_AXES, Config, ModelConfig, mesh_axes, problems_of, replace
from transformer.config.validation import mesh_problems
from transformer.plans.chips import Topology
from transformer.plans.roofline import Prediction, axis_bandwidth, collective_seconds, prediction

MOMENTS = {"adamw": 2, "muon": 1, "lion": 1, "sgd": 0, "schedule_free": 2, "adafactor": 0}
"""Arrays as large as the parameters that each optimizer keeps, about."""

HIDDEN = ("fsdp", "replica")
"""Axes whose transfers wait for no product of the same layer, and can all be beside some."""


@dataclass(frozen=True)
class Estimate:
    """What one configuration would need on each chip, and take."""

    config: Config
    topology: Topology
    parameters: float
    optimizer_state: float
    gradients: float
    activations: float
    working: float
    """Of a layer while it is computed, of logits, and of gathered parameters."""
    seconds: Prediction
    transfers: dict[str, float]
    """Seconds of transfers by axis."""

    @property
    def bytes(self) -> float:
        return self.parameters + self.optimizer_state + self.gradients + self.activations + self.working

    @property
    def slowest(self) -> str:
        """What the time goes to, in words."""
        found = {"products": self.seconds.products, **{f"{axis} transfers": s for axis, s in self.transfers.items()}}
        return ", ".join(f"{name} {s:.3g} s" for name, s in sorted(found.items(), key=lambda i: -i[1])[:2] if s)


def estimate(config: Config, topology: Topology) -> Estimate:
    """Returns the estimate of a configuration whose vocabulary is known and whose splits divide."""
    from transformer.parallel.sharding import partition_spec

    axes, chip, model = mesh_axes(config, topology.num_chips), topology.chip, config.model
    held, layer, stacked, outside = 0.0, 0.0, 0.0, 0.0
    for spec in _specs(dataclasses.replace(model, remat="none")):
        layout = partition_spec(spec.axes, spec.shape, axes)
        parts = [p for entry in layout for p in (entry if isinstance(entry, tuple) else (entry,)) if p]
        held += math.prod(spec.shape) / math.prod(axes[p] for p in parts)
        # Gathered over fsdp: what the other axes leave.
        whole = math.prod(spec.shape) / math.prod(axes[p] for p in parts if p != "fsdp")
        if spec.num_layers:
            layer += whole / spec.num_layers
            stacked += whole / axes["stage"]
        else:
            outside += whole
    rows = config.train.batch_size / config.train.num_microbatches / math.prod(axes[axis] for axis in DATA_AXES)
    tokens = rows * config.data.sequence_length / axes["context"]
    layers = model.num_layers / axes["stage"]
    tensor, element = axes["tensor"], 2 if model.compute_dtype == "bfloat16" else 4
    hidden = model.gated + 1
    shared = (
        2 * model.kv_heads * model.head_dim
        if any(k.mixer == "attention" for k in (*model.first_kinds, *model.kinds))
        else 0
    )
    width = model.ff_width
    if any(kind.feedforward == "experts" for kind in (*model.first_kinds, *model.kinds)):
        width = model.expert_dim * (model.experts_per_token + model.num_shared_experts)
    inside = (2 * model.num_heads * model.head_dim + shared + hidden * width) / tensor
    kept = {
        "full": model.width,
        "dots": 3 * model.width + inside,
        "none": 8 * model.width + 2 * inside + width / tensor,
    }
    activations = layers * tokens * element * kept[model.remat]
    chunk = config.objective.logit_chunk or config.data.sequence_length
    # In 32 bits, and their gradient in the type of activations.
    logits = (4 + element) * tokens * min(1, chunk / config.data.sequence_length) * model.vocab_rows / tensor
    working = tokens * element * (4 * model.width + 1.5 * inside) + (layer + outside) * element + logits
    sets = 1 + (config.train.num_microbatches > 1)
    moments = 0 if config.parallel.offload_optimizer else MOMENTS[config.optimizer.name]
    transfers = _transfers(config, topology, axes, tokens, stacked, outside, held)
    exposed = {axis: s for axis, s in transfers.items() if axis not in HIDDEN}
    hidden_seconds = math.fsum(s for axis, s in transfers.items() if axis not in exposed)
    memory = 2 * (4 * held * (2 + moments) + activations + element * stacked) / chip.hbm_bandwidth
    seconds = prediction(config, topology, axes["stage"], memory, math.fsum(exposed.values()), 0.0, hidden_seconds)
    return Estimate(
        config, topology, 4 * held, 4 * held * moments, 4 * held * sets, activations, working, seconds, transfers
    )


@functools.cache
def _specs(model: ModelConfig) -> tuple[Any, ...]:
    import jax

    from transformer.models.parameters import is_spec, parameter_specs
    from transformer.models.transformer import Transformer

    scanned = dataclasses.replace(model, scan_layers=True, num_positions=model.num_positions or 1)
    return tuple(jax.tree.leaves(parameter_specs(Transformer(scanned)), is_leaf=is_spec))


def _transfers(
    config: Config, topology: Topology, axes: dict[str, int], tokens: float, layers: float, outside: float, held: float
) -> dict[str, float]:
    """Returns seconds a step by axis. `layers`, `outside`: parameters of a chip's layers and besides, gathered."""
    chip, model, parts = topology.chip, config.model, config.train.num_microbatches
    element = 2 if model.compute_dtype == "bfloat16" else 4
    bandwidth, inner = {}, 1
    for axis in reversed(axes):
        bandwidth[axis] = axis_bandwidth(chip, topology.shape, axes[axis], inner)
        inner *= axes[axis]
    again = model.remat == "full"
    whole, stream = layers + outside, tokens * model.width * element
    depth = model.num_layers / axes["stage"]
    gathers = (2 + again) * collective_seconds("all-gather", whole * element, axes["fsdp"], bandwidth["fsdp"])
    scatters = collective_seconds("reduce-scatter", whole * element, axes["fsdp"], bandwidth["fsdp"])
    sums = collective_seconds("all-reduce", stream, axes["tensor"], bandwidth["tensor"])
    across = chip.dcn_bandwidth if topology.num_slices > 1 else bandwidth["replica"]
    gradient = collective_seconds("all-reduce", held * element, axes["replica"], across)
    found = {
        "fsdp": parts * (gathers + scatters),
        "tensor": parts * depth * (4 + 2 * again) * sums,
        "replica": parts * gradient,
    }
    if axes["expert"] > 1:
        sent = stream * model.experts_per_token
        one = collective_seconds("all-to-all", sent, axes["expert"], bandwidth["expert"])
        found["expert"] = parts * depth * (4 + 2 * again) * one
    if axes["context"] > 1:
        keys = 2 * model.kv_heads * model.head_dim / axes["tensor"] * tokens * element
        found["context"] = parts * depth * 3 * axes["context"] * keys / bandwidth["context"]
    if axes["stage"] > 1:
        found["stage"] = 2 * parts * stream / bandwidth["stage"]
    return {axis: seconds for axis, seconds in found.items() if seconds}


@dataclass(frozen=True)
class Change:
    """A change to a configuration, and the bytes that it saves on each chip by arithmetic."""

    text: str
    saved: float


def changes_that_help(config: Config, topology: Topology, count: int = 3) -> list[Change]:
    """Returns the changes that save the most memory, those that `train` would accept."""
    axes, train, model = mesh_axes(config, topology.num_chips), config.train, config.model
    fixed = replace(config, parallel=dict(axes))
    candidates = {
        "--model.remat full": {"model": {"remat": "full"}} if model.remat != "full" else None,
        "--model.remat dots": {"model": {"remat": "dots"}} if model.remat == "none" else None,
        f"--train.num-microbatches {2 * train.num_microbatches}": {
            "train": {"num_microbatches": 2 * train.num_microbatches}
        },
        f"--train.batch-size {train.batch_size // 2}": {"train": {"batch_size": train.batch_size // 2}},
        "--objective.logit-chunk 1024": {"objective": {"logit_chunk": 1024}}
        if not config.objective.logit_chunk and config.data.sequence_length > 1024
        else None,
        "--parallel.offload-optimizer True": {"parallel": {"offload_optimizer": True}}
        if not config.parallel.offload_optimizer
        else None,
    }
    for one in ("fsdp", "tensor", "expert", "context", "stage"):
        for other in axes:
            if one != other and axes[other] % 2 == 0:
                flags = f"--parallel.{one} {2 * axes[one]} --parallel.{other} {axes[other] // 2}"
                candidates[flags] = {"parallel": {one: 2 * axes[one], other: axes[other] // 2}}
    before, found = estimate(fixed, topology).bytes, []
    for text, change in candidates.items():
        if change is None:
            continue
        changed = replace(fixed, **change)
        # An axis of size one has an implementation or not; what has not says so.
        if problems_of(changed, "tpu") or mesh_problems(changed, topology.num_chips):
            continue
        saved = before - estimate(changed, topology).bytes
        if saved > 0:
            found.append(Change(text, saved))
    return sorted(found, key=lambda change: -change.saved)[:count]

"""How long a step takes, predicted: products at a share of the peak, memory, and what transfers are not hidden.

Williams, Waterman and Patterson 2009 for the roofline; Austin et al. 2025, "How to Scale Your Model", for the times of
collectives on a torus. The model:

    step = max(products, memory) + transfers in the open + what of the hidden ones products do not cover

- products: FLOPs counted from shapes, rematerialisation included, causal attention as half, over peak x `EFFICIENCY`;
- memory: state read and written once, activations and gathered parameters written once and read once;
- a collective over a group: the bytes that a chip sends over the links that its group has. A dimension of the torus that
  the group spans gives a link, and both of them where it is closed to a ring; between slices it is the chip's share of the
  data-centre network.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformer.config import Config, source_length
from transformer.plans.chips import Chip, Topology
from transformer.plans.collectives import Collective
from transformer.plans.compilation import Compiled

EFFICIENCY = 0.8
"""Share of the peak that products reach: assumed, and not fitted to any run."""


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step and what follows from them."""

    products: float
    memory: float
    exposed_ici: float
    exposed_dcn: float
    hidden: float
    """Transfers with other work beside them."""
    bubble: float
    """Share of the time of products that stages of a pipeline wait besides."""
    step_flops: float
    """The model's own, attention by its causal half, on all chips."""
    executed_flops: float
    num_tokens: int
    peak_flops: float
    """Of all chips."""

    @property
    def step_seconds(self) -> float:
        busy = max(self.products * (1 + self.bubble), self.memory)
        return busy + self.exposed_ici + self.exposed_dcn + max(0.0, self.hidden - busy)

    @property
    def mfu(self) -> float:
        return self.step_flops / self.peak_flops / self.step_seconds

    @property
    def tokens_per_day(self) -> float:
        return self.num_tokens / self.step_seconds * 86_400


def predict(compiled: Compiled) -> Prediction:
    """Returns the prediction for a compiled step."""
    chip = compiled.topology.chip
    times = [(item, item.count * seconds_of(item, compiled)) for item in compiled.collectives]
    hidden = math.fsum(seconds for item, seconds in times if item.overlapped)
    open_ones = [(item, seconds) for item, seconds in times if not item.overlapped]
    memory = compiled.memory
    gathered = sum(item.bytes * item.count for item in compiled.collectives if item.kind == "all-gather")
    # Read and written: state. Written and read: gradients, activations, gathered parameters.
    traffic = 2 * (memory.parameters + memory.optimizer_state + memory.gradients + memory.activations + gathered)
    return prediction(
        compiled.config,
        compiled.topology,
        compiled.axes["stage"],
        traffic / chip.hbm_bandwidth,
        math.fsum(seconds for item, seconds in open_ones if not item.crosses_slices),
        math.fsum(seconds for item, seconds in open_ones if item.crosses_slices),
        hidden,
    )


def open_seconds(compiled: Compiled) -> dict[str, float]:
    """Returns the seconds by axis of the transfers that nothing is computed beside."""
    found: dict[str, float] = {}
    for item in compiled.collectives:
        if not item.overlapped:
            axes = "+".join(item.axes)
            found[axes] = found.get(axes, 0.0) + item.count * seconds_of(item, compiled)
    return found


def prediction(
    config: Config, topology: Topology, stages: int, memory: float, ici: float, dcn: float, hidden: float
) -> Prediction:
    """Returns the prediction from what its transfers and its memory take; stages wait as GPipe's do."""
    from transformer.benchmarks.program import recomputed_flops
    from transformer.models import flops

    tokens = config.train.batch_size * config.data.sequence_length
    length, source = config.data.sequence_length, source_length(config)
    own = tokens * flops.training_flops_per_token(config.model, length, True, source)
    executed = own + recomputed_flops(config)
    peak = topology.chip.peak_flops * topology.num_chips
    bubble = (stages - 1) / config.train.num_microbatches
    return Prediction(executed / peak / EFFICIENCY, memory, ici, dcn, hidden, bubble, own, executed, tokens, peak)


def seconds_of(collective: Collective, compiled: Compiled) -> float:
    """Returns how long one of these takes by itself."""
    chip = compiled.topology.chip
    if collective.group_size <= 1:
        return 0.0
    if collective.crosses_slices:
        return collective.moved / chip.dcn_bandwidth
    places = [compiled.coordinates[device][1:] for device in collective.group if device < len(compiled.coordinates)]
    links = num_links(chip, compiled.topology.shape, places)
    if collective.kind == "collective-permute":
        links = 1  # all goes to one neighbour
    return collective.moved / (links * chip.link_bandwidth)


def num_links(chip: Chip, shape: Sequence[int], places: Sequence[Sequence[int]]) -> int:
    """Returns over how many of its links a chip sends to a group of chips at these places of the torus, at least 1."""
    if not chip.torus_dims or not places:
        return 1
    count = 0
    for dim, side in enumerate(shape):
        extent = len({place[dim] for place in places if dim < len(place)})
        closed = extent == side and side % chip.wrap_multiple == 0
        count += 0 if extent <= 1 else 2 if closed else 1
    return max(1, count)


def days_for(tokens: float, found: Prediction) -> float:
    return tokens / found.tokens_per_day


def chip_hours(tokens: float, found: Prediction, topology: Topology) -> float:
    return 24 * days_for(tokens, found) * topology.num_chips


def collective_seconds(kind: str, size: float, group: int, bandwidth: float) -> float:
    """Returns the time of a collective by arithmetic alone, over what a chip can send to its group."""
    if group <= 1:
        return 0.0
    share = (group - 1) / group * (2 if kind == "all-reduce" else 1)
    return share * size / bandwidth


def axis_bandwidth(chip: Chip, shape: Sequence[int], size: int, before: int) -> float:
    """Returns what a chip can send along a mesh axis, as if the mesh filled the torus side by side, the innermost axis first.

    `before`: chips that the axes inside of it take.
    """
    if not chip.torus_dims:
        # Within a host, or over the network between them.
        return chip.link_bandwidth if before * size <= shape[1] else chip.dcn_bandwidth
    links, left, skip = 0, size, before
    for side in sorted(shape):
        inside = math.gcd(side, skip)
        skip //= inside
        mine = math.gcd(side // inside, left)
        left //= mine
        if mine > 1:
            links += 2 if mine == side and side % chip.wrap_multiple == 0 else 1
    return max(1, links) * chip.link_bandwidth

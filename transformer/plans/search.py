"""The splits, microbatches and rematerialisation that suit a model and a topology: all by arithmetic, some compiled."""

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from transformer.config import MESH_AXES, Config, mesh_axes, problems_of, replace
from transformer.config.validation import mesh_problems
from transformer.plans.arithmetic import HIDDEN, Estimate, estimate
from transformer.plans.chips import Topology
from transformer.plans.compilation import Compiled, axes_text, compile_for
from transformer.plans.roofline import Prediction, open_seconds, predict

REMAT = ("none", "dots", "full")
MOST_MICROBATCHES = 64
WIDEST_TENSOR = 16
"""Beyond this the sums of a layer over the axis take longer than its products on every chip that there is."""


@dataclass(frozen=True)
class Candidate:
    """A setting that was weighed, and what became of it."""

    estimate: Estimate
    verdict: str
    """Why it lost; empty for one that was compiled."""
    compiled: Compiled | None = None
    prediction: Prediction | None = None


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    ranked: list[Candidate]
    """Compiled and fitting, the fastest first."""
    lost: list[Candidate]
    refused: Counter[str]
    """Settings that `train` would refuse, by reason."""


def settings(config: Config, topology: Topology, axes: Sequence[str] = MESH_AXES) -> Iterator[Config]:
    """Yields every split over `axes` whose product is the number of chips, with every number of microbatches that divides the
    batch and every `remat`; `replica` is a multiple of the slices, which nothing else crosses."""
    for sizes in _splits(topology.num_chips, axes):
        split = dict.fromkeys(MESH_AXES, 1) | sizes
        if split["replica"] % topology.num_slices or split["tensor"] > WIDEST_TENSOR:
            continue
        parts = 1
        while parts <= MOST_MICROBATCHES and config.train.batch_size % parts == 0:
            for remat in REMAT:
                yield replace(config, parallel=split, train={"num_microbatches": parts}, model={"remat": remat})
            parts *= 2


def _splits(count: int, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    if len(axes) == 1:
        yield {axes[0]: count}
        return
    for size in (size for size in range(1, count + 1) if count % size == 0):
        for rest in _splits(count // size, axes[1:]):
            yield {axes[0]: size, **rest}


def search(
    config: Config,
    topology: Topology,
    num_compiled: int = 5,
    axes: Sequence[str] = MESH_AXES,
    num_periods: int | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Found:
    """Returns the fastest settings, compiled and ranked: `num_compiled` of those that fit.

    What is compiled next is what is expected to be the fastest: by arithmetic, in which each axis leaves that share of its
    transfers in the open which it did in the steps compiled so far. One that does not fit after all is replaced by the next.
    `tell` is told what is compiled, which takes a minute or two each.
    """
    refused: Counter[str] = Counter()
    sound: list[Estimate] = []
    for candidate in settings(config, topology, axes):
        problems = mesh_problems(candidate, topology.num_chips) or problems_of(candidate, topology.chip.platform)
        if problems:
            refused[_reason(problems[0])] += 1
        else:
            sound.append(estimate(candidate, topology))
    sound.sort(key=lambda item: item.seconds.step_seconds)
    lost = [Candidate(item, _too_large(item)) for item in sound if item.bytes > topology.chip.hbm_bytes]
    left = [item for item in sound if item.bytes <= topology.chip.hbm_bytes]
    ranked: list[Candidate] = []
    shares: dict[str, list[float]] = {}

    def order(item: Estimate) -> tuple[float, float]:
        return expected_seconds(item, shares), item.bytes

    while left and len(ranked) < num_compiled:
        item = min(left, key=order)
        left.remove(item)
        tell(f"compiling {setting_text(item.config, topology)}: {expected_seconds(item, shares):.3g} s expected")
        compiled = compile_for(item.config, topology, num_periods)
        if not compiled.fits:
            needed = f"{compiled.memory.total / 2**30:.1f} GiB of {compiled.hbm_bytes / 2**30:.1f}"
            lost.append(Candidate(item, f"does not fit once compiled: {needed}", compiled))
            continue
        ranked.append(Candidate(item, "", compiled, predict(compiled)))
        found = open_seconds(compiled)
        for axis, seconds in item.transfers.items():
            shares.setdefault(axis, []).append(found.get(axis, 0.0) / seconds)
    ranked.sort(key=lambda item: item.prediction.step_seconds if item.prediction else 0.0)
    for other in sorted(left, key=order) if ranked else ():
        assert ranked[0].prediction is not None
        slower = expected_seconds(other, shares) / ranked[0].prediction.step_seconds
        lost.append(Candidate(other, f"{slower:.2f} times as long expected: {other.slowest}"))
    return Found(ranked, lost, refused)


def expected_seconds(item: Estimate, shares: Mapping[str, Sequence[float]]) -> float:
    """Returns the seconds of a step, if each axis leaves the mean of these shares of its transfers in the open; one without
    shares what arithmetic alone supposes."""
    usual = {axis: 0.0 if axis in HIDDEN else 1.0 for axis in item.transfers}
    share = usual | {axis: statistics.mean(found) for axis, found in shares.items() if axis in usual}
    exposed = math.fsum(share[axis] * seconds for axis, seconds in item.transfers.items())
    hidden = math.fsum(max(0.0, 1 - share[axis]) * seconds for axis, seconds in item.transfers.items())
    return dataclasses.replace(item.seconds, exposed_ici=exposed, exposed_dcn=0.0, hidden=hidden).step_seconds


def _too_large(item: Estimate) -> str:
    return f"{item.bytes / 2**30:.1f} GiB of {item.topology.chip.hbm_bytes / 2**30:.1f} by arithmetic"


def _reason(problem: str) -> str:
    """Returns a problem without its numbers, so that equal ones are counted together."""
    return re.sub(r"\d[\d,.]*", "N", problem)


def setting_text(config: Config, topology: Topology) -> str:
    """Returns a setting in words."""
    parts, remat = config.train.num_microbatches, config.model.remat
    return f"{axes_text(mesh_axes(config, topology.num_chips))}, {parts} microbatches, remat {remat}"


def flags_of(config: Config, topology: Topology) -> str:
    """Returns a setting as it is given to `train`."""
    axes = mesh_axes(config, topology.num_chips)
    split = [f"--parallel.{axis} {size}" for axis, size in axes.items() if size > 1 or axis == "fsdp"]
    return " ".join(
        [*split, f"--train.num-microbatches {config.train.num_microbatches}", f"--model.remat {config.model.remat}"]
    )

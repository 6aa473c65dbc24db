"""What `transformer benchmark rnn` makes of its measurements: tables, a model of time fitted to them, and what it predicts.

A step takes as long as its work at the throughput that the hardware has for it, or as long as its chain of products that wait for
each other at the latency of one, whichever is longer: time = max(work / throughput, chain x latency).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transformer.benchmarks.report import table

DEVICES = 8
"""Simulated, among which one text is split."""
SPLIT_LENGTH = 1024
"""Tokens of that text."""
LANE = 6e9
"""FLOP/s of a lane: a multiplication and an addition in each cycle of 3 GHz."""
LANES = (10, 1_000, 100_000)
PAIR = ("lstm", "attention")
"""What it compares."""


@dataclass(frozen=True)
class Cell:
    """One mixer on texts of one length."""

    mixer: str
    length: int
    parameters: int
    seconds: tuple[float, ...]
    """Of each step that was timed; empty where it was not run."""
    bytes: int
    """That the compiled step needs."""
    flops: int
    """Of all products of the compiled step."""
    product_bytes: int
    """Read and written by them."""
    chain: int
    """Products of the step that wait for each other; of attention as it is defined, every score at once."""


@dataclass(frozen=True)
class Fit:
    """The model of time, as it fits the measurements best."""

    latency: float
    """Seconds of a product in a chain."""
    throughput: Mapping[str, float]
    """FLOP/s by mixer."""
    errors: tuple[float, ...]
    """Predicted over measured, less one, of each cell."""

    def seconds(self, mixer: str, work: int, chain: int, lanes_more: float = 1.0) -> float:
        """Returns the time of a step, on hardware with `lanes_more` times the lanes."""
        return max(work / (self.throughput[mixer] * lanes_more), chain * self.latency)


def fit(cells: Sequence[Cell]) -> Fit | None:
    """Returns the latency, of all mixers, and the throughput of each with the least squared error of the logarithm.

    Returns None where nothing was measured.
    """
    measured = {m: [c for c in cells if c.mixer == m and c.seconds] for m in dict.fromkeys(c.mixer for c in cells)}
    measured = {mixer: group for mixer, group in measured.items() if group}
    if not measured:
        return None
    latencies, throughputs = np.logspace(-9, -2, 281), np.logspace(6, 16, 401)
    total, best = np.zeros(len(latencies)), {}
    for mixer, group in measured.items():
        work, chain = (np.array([getattr(c, name) for c in group], float) for name in ("flops", "chain"))
        seconds = np.array([statistics.median(c.seconds) for c in group])
        bound = np.maximum(work / throughputs[:, None, None], chain * latencies[None, :, None])
        squares = np.sum(np.log(bound / seconds) ** 2, axis=-1)
        # Where the chain explains all, any throughput above will do: the lowest claims least.
        best[mixer] = np.argmin(squares, axis=0)
        total += np.min(squares, axis=0)
    at = int(np.argmin(total))
    throughput = {mixer: float(throughputs[found[at]]) for mixer, found in best.items()}
    made = Fit(float(latencies[at]), throughput, ())
    errors = [made.seconds(c.mixer, c.flops, c.chain) / statistics.median(c.seconds) - 1 for c in cells if c.seconds]
    return Fit(made.latency, throughput, tuple(errors))


def predicted(cells: Sequence[Cell], found: Fit, ceiling: float, lanes: int) -> dict[int, float]:
    """Returns for each length how many times as long as attention an LSTM takes on hardware of so many lanes."""
    more = lanes * LANE / ceiling

    def seconds(mixer: str, length: int) -> float:
        return found.seconds(mixer, *_at(cells, mixer, length), lanes_more=more)

    shortest, longest = min(c.length for c in cells), max(c.length for c in cells)
    lengths = [2**power for power in range(40) if shortest <= 2**power <= longest] or [longest]
    return {length: seconds(PAIR[0], length) / seconds(PAIR[1], length) for length in lengths}


def _at(cells: Sequence[Cell], mixer: str, length: int) -> tuple[int, int]:
    """Returns work and chain of a step at a length, on the lines through the shortest and the longest measured."""
    group = sorted((c for c in cells if c.mixer == mixer), key=lambda c: c.length)
    first, last = group[0], group[-1]
    share = (length - first.length) / max(1, last.length - first.length)
    return (
        max(1, round(first.flops + share * (last.flops - first.flops))),
        max(1, round(first.chain + share * (last.chain - first.chain))),
    )


def report(cells: Sequence[Cell], ceiling: float, at_once: Mapping[str, float], machine: Mapping[str, Any]) -> str:
    """Returns everything in Markdown."""
    mixers = list(dict.fromkeys(c.mixer for c in cells))
    by_place = {(c.mixer, c.length): c for c in cells}
    lengths = sorted({c.length for c in cells})

    def by_length(show: Any) -> str:
        rows = [[m.replace("_", " "), *(show(by_place[m, length]) for length in lengths)] for m in mixers]
        return table(["mixer", *(f"{length:,} tokens" for length in lengths)], rows)

    def speed(cell: Cell) -> str:
        return f"{1 / statistics.median(cell.seconds):.3g}" if cell.seconds else "not run"

    def share(cell: Cell) -> str:
        return f"{cell.flops / statistics.median(cell.seconds) / ceiling:.0%}" if cell.seconds else "–"

    parameters = sorted({c.parameters for c in cells})
    versions = machine["versions"]
    parts = [
        f"{machine['num_devices']} x {machine['device_kind']} ({machine['processor']}), JAX {versions.get('jax')}; "
        f"{parameters[0]:,} to {parameters[-1]:,} parameters. The ceiling of products here is {ceiling / 1e9:,.1f} GFLOP/s.",
        f"Steps a second, all of as many tokens:\n\n{by_length(speed)}",
        f"MiB that the compiled step needs:\n\n{by_length(lambda c: f'{c.bytes / 2**20:,.0f}')}",
        f"Products of the step that wait for each other (its longest chain):\n\n{by_length(lambda c: f'{c.chain:,}')}",
        "FLOPs for each byte that products read and write:\n\n"
        + by_length(lambda c: f"{c.flops / max(1, c.product_bytes):.3g}"),
        f"FLOP/s of products, of the ceiling:\n\n{by_length(share)}",
        f"Of {DEVICES} devices among which a text of {SPLIT_LENGTH:,} tokens is split, so many work on products at once:\n\n"
        + table(["mixer", "devices"], [[m.replace("_", " "), f"{count:.1f}"] for m, count in at_once.items()]),
    ]
    if (found := fit(cells)) is not None:
        errors = sorted(map(abs, found.errors))
        parts.append(
            f"Fitted: time = max(work / throughput, chain x latency), with a latency of {found.latency * 1e6:.3g} us and\n\n"
            + table(
                ["mixer", "throughput, of the ceiling"],
                [[m.replace("_", " "), f"{t / ceiling:.0%}"] for m, t in found.throughput.items()],
            )
            + f"\nIts predictions are off by {statistics.median(errors):.0%} in the median, {errors[-1]:.0%} at most."
        )
        if all(mixer in found.throughput for mixer in PAIR):
            parts.append(_crossing(cells, found, ceiling))
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _crossing(cells: Sequence[Cell], found: Fit, ceiling: float) -> str:
    """Says at which lengths attention is the faster, by the number of lanes."""
    found_by = {lanes: predicted(cells, found, ceiling, lanes) for lanes in LANES}
    lengths = list(found_by[LANES[0]])
    rows = []
    for lanes, ratios in found_by.items():
        faster = [length for length, ratio in ratios.items() if ratio > 1]
        where = f"from {faster[0]:,} to {faster[-1]:,} tokens" if faster else "at none of these lengths"
        rows.append([f"{lanes:,}", *(f"{ratio:.3g}" for ratio in ratios.values()), where])
    return (
        f"A lane does {LANE / 1e9:.0f} GFLOP/s, so that this machine has {ceiling / LANE:.1f}; the latency is the same everywhere. "
        "By the model, an LSTM takes so many times as long as attention:\n\n"
        + table(["lanes", *(f"{length:,}" for length in lengths), "attention is faster"], rows)
    )


def draw(cells: Sequence[Cell], ceiling: float, figure: Any) -> None:
    """Draws steps a second over the length, measured and fitted, and what the model predicts on other hardware."""
    left, right = figure.subplots(1, 2)
    found = fit(cells)
    for number, mixer in enumerate(dict.fromkeys(c.mixer for c in cells)):
        group = [c for c in cells if c.mixer == mixer and c.seconds]
        lengths = [c.length for c in group]
        left.plot(lengths, [1 / statistics.median(c.seconds) for c in group], "o", color=f"C{number}", label=mixer)
        if found is not None and group:
            times = [found.seconds(mixer, c.flops, c.chain) for c in group]
            left.plot(lengths, [1 / time for time in times], "-", color=f"C{number}", linewidth=1)
    left.set(
        xlabel="tokens of a text", ylabel="steps a second (points: measured, lines: fitted)", xscale="log", yscale="log"
    )
    left.set_xscale("log", base=2)
    left.legend(frameon=False, fontsize=8)
    if found is not None and all(mixer in found.throughput for mixer in PAIR):
        for lanes in LANES:
            ratios = predicted(cells, found, ceiling, lanes)
            right.plot(list(ratios), list(ratios.values()), label=f"{lanes:,} lanes")
        right.axhline(1, color="black", linewidth=0.8)
        right.set(xlabel="tokens of a text", ylabel="time of an LSTM over that of attention", yscale="log")
        right.set_xscale("log", base=2)
        right.legend(frameon=False, fontsize=8)

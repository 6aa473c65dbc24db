"""Whether the best learning rate stays where it is as the model gets wider (Yang et al. 2022, arXiv:2203.03466)."""

import math
from collections.abc import Sequence
from typing import Any

from transformer.benchmarks.report import table
from transformer.config import Config, replace
from transformer.studies.study import Outcome, Study, Trial, by_trial

WIDTHS = (64, 128, 256, 512)
HEAD_WIDTH = 64
RATES = {
    "standard": tuple(2.0**power for power in range(-12, -4)),
    "mup": tuple(2.0**power for power in range(-10, -3)),
}
"""Learning rates by parametrisation: wide enough for the best to lie inside."""


def trials(base: Config) -> list[Trial]:
    """Returns every width with every learning rate, under both parametrisations."""
    made = []
    for parametrization, rates in RATES.items():
        for width in WIDTHS:
            for rate in rates:
                model = {"width": width, "num_heads": width // HEAD_WIDTH, "parametrization": parametrization}
                config = replace(base, model=model, optimizer={"learning_rate": rate})
                name = f"{parametrization}_{width}_2^{round(math.log2(rate))}"
                facts = {"parametrization": parametrization, "width": width, "rate": rate}
                made.append(Trial(name, config, facts))
    return made


def losses(outcomes: Sequence[Outcome]) -> dict[tuple[str, int], dict[float, float]]:
    """Returns the mean last loss over the seeds by (parametrisation, width), then by rate; infinite where a run diverged."""
    found: dict[tuple[str, int], dict[float, float]] = {}
    for group in by_trial(outcomes).values():
        facts = group[0].facts
        values = [math.inf if o.diverged or not o.final else o.final["cross_entropy"] for o in group]
        mean = sum(values) / len(values)
        found.setdefault((facts["parametrization"], facts["width"]), {})[facts["rate"]] = (
            mean if mean == mean else math.inf
        )
    return found


def best_rate(by_rate: dict[float, float]) -> float | None:
    """Returns the rate at the vertex of the parabola through the lowest loss and its neighbours, over the logarithm.

    Returns None where the lowest lies at an end of the rates, and its rate where a neighbour diverged.
    """
    rates = sorted(by_rate)
    lowest = min(range(len(rates)), key=lambda i: by_rate[rates[i]])
    if not 0 < lowest < len(rates) - 1:
        return None
    before, at, after = (by_rate[rates[i]] for i in (lowest - 1, lowest, lowest + 1))
    if not math.isfinite(after + before):
        return rates[lowest]
    shift = 0.5 * (before - after) / (before - 2 * at + after)
    return rates[lowest] * (rates[lowest + 1] / rates[lowest]) ** shift


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns the losses by width and rate, and how far the best rate moved."""
    found = losses(outcomes)
    text = ""
    for parametrization in RATES:
        by_width = {width: by_rate for (name, width), by_rate in found.items() if name == parametrization}
        if not by_width:
            continue
        rates = sorted({rate for by_rate in by_width.values() for rate in by_rate})
        rows = []
        for width, by_rate in by_width.items():
            best = best_rate(by_rate)
            cells = [f"{by_rate[rate]:.3f}" if rate in by_rate else "–" for rate in rates]
            rows.append([width, *cells, "at the end" if best is None else f"{best:.2g}"])
        header = ["width", *(f"2^{round(math.log2(rate))}" for rate in rates), "best rate"]
        bests = [best for by_rate in by_width.values() if (best := best_rate(by_rate)) is not None]
        moved = f"{max(bests) / min(bests):.2g}" if len(bests) == len(by_width) else "unknown"
        text += f"`{parametrization}`: the best rates differ by a factor of {moved}.\n\n{table(header, rows)}\n"
    return text


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws the loss over the learning rate, a curve a width, a panel a parametrisation."""
    panels = dict(zip(RATES, figure.subplots(1, 2, sharey=True), strict=True))
    for (parametrization, width), by_rate in losses(outcomes).items():
        rates = [rate for rate in sorted(by_rate) if math.isfinite(by_rate[rate])]
        panels[parametrization].plot(rates, [by_rate[rate] for rate in rates], "o-", label=f"width {width}")
    for parametrization, axes in panels.items():
        axes.set(title=parametrization, xlabel="learning rate", xscale="log")
        axes.set_xscale("log", base=2)
        axes.legend(frameon=False, fontsize=8)
    panels["standard"].set(ylabel="validation loss (nats a token)")


STUDY = Study(trials, report, draw)

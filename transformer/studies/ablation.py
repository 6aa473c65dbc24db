"""The parts of a Transformer, removed one at a time: what each is worth, at equal steps and tokens."""

import re
from collections.abc import Sequence
from typing import Any

from transformer.benchmarks.report import table
from transformer.config import Config, replace
from transformer.studies.study import Outcome, Study, Trial, by_trial, last, spread

PARTS: dict[str, dict[str, dict[str, Any]]] = {
    "full": {},
    "no_residuals": {"model": {"residuals": False}},
    "no_normalisation": {"model": {"norm": "none"}},
    "no_positions": {"model": {"positions": "none"}},
    "no_scale": {"model": {"attention_scale": 1.0}},
    "one_head": {"model": {"num_heads": 1, "num_kv_heads": None}},
    "no_mlp": {"model": {"layers": "attention/none"}},
    "post_norm": {"model": {"norm_placement": "post"}},
    "post_norm_no_warmup": {"model": {"norm_placement": "post"}, "optimizer": {"warmup_steps": 0}},
}
"""What is changed of the recipe."""

DEPTHS = (1, 2, 8)
"""Layers with which both the whole model and the one without residuals are trained besides the recipe's."""


def trials(base: Config) -> list[Trial]:
    """Returns the whole model, each part removed, and the model with and without residuals at other depths."""
    depth = base.model.num_layers
    made = [Trial(name, replace(base, **changes), {"layers": depth}) for name, changes in PARTS.items()]
    for layers in DEPTHS:
        for name in ("full", "no_residuals") if layers != depth else ():
            config = replace(base, **PARTS[name])
            made.append(
                Trial(f"{name}_{layers}_layers", replace(config, model={"num_layers": layers}), {"layers": layers})
            )
    return made


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns a table of the parts and one of the depths."""
    groups = by_trial(outcomes)
    reference = last(groups.get("full", []), "cross_entropy")
    mean = sum(reference) / len(reference) if reference else None
    parts, depths = [], []
    for name, group in groups.items():
        losses = last(group, "cross_entropy")
        diverged = sum(outcome.diverged for outcome in group)
        more = f"{sum(losses) / len(losses) - mean:+.3f}" if losses and mean is not None else "–"
        label = re.sub(r"_\d+_layers$", "", name).replace("_", " ")
        row = [label, f"{group[0].parameters:,}", spread(losses), more, f"{diverged} of {len(group)}"]
        if name in PARTS:
            parts.append(row)
        if any(_is_depth(name, prefix) for prefix in ("full", "no_residuals")):
            depths.append((group[0].facts["layers"], [label, group[0].facts["layers"], *row[2:3], row[4]]))
    header = ["model", "parameters", "validation loss", "above full", "diverged"]
    by_depth = [row for _, row in sorted(depths, key=lambda item: item[0])]
    return (
        f"Validation loss in nats a token, mean and standard deviation over seeds.\n\n{table(header, parts)}\n"
        f"With and without residuals, by depth:\n\n{table(['model', 'layers', 'validation loss', 'diverged'], by_depth)}"
    )


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws the learning curves of the parts, and the last losses by depth."""
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    groups = by_trial(outcomes)
    for name, group in groups.items():
        if name in PARTS:
            steps = [step for step, _ in group[0].curve]
            losses = [
                sum(values) / len(values) for values in zip(*(_curve(outcome) for outcome in group), strict=False)
            ]
            left.plot(
                steps[: len(losses)], losses, label=name.replace("_", " "), linewidth=2.5 if name == "full" else 1.2
            )
    left.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
    left.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    for prefix, color in (("full", "#2f6db3"), ("no_residuals", "#c8452c")):
        points = sorted(
            (group[0].facts["layers"], last(group, "cross_entropy"))
            for n, group in groups.items()
            if _is_depth(n, prefix)
        )
        found = [(layers, loss) for layers, losses in points for loss in losses]
        right.plot(*zip(*found, strict=True), "o", color=color, label=prefix.replace("_", " ")) if found else None
    right.set(xlabel="layers", ylabel="validation loss at the end", xscale="log")
    right.set_xticks(layers := sorted({outcome.facts["layers"] for outcome in outcomes}), list(map(str, layers)))
    right.minorticks_off()
    right.legend(frameon=False, fontsize=8)


def _is_depth(name: str, prefix: str) -> bool:
    return name == prefix or (name.startswith(f"{prefix}_") and name.endswith("_layers"))


def _curve(outcome: Outcome) -> list[float]:
    return [loss for _, loss in outcome.curve]


STUDY = Study(trials, report, draw)

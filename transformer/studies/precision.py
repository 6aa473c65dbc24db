"""The types of matrix products, and logits in chunks: how far from training in float32 each leads."""

from collections.abc import Sequence
from typing import Any

from transformer.benchmarks.report import table
from transformer.config import Config, replace
from transformer.studies.study import Outcome, Study, Trial, by_trial

STEPS, EVERY_STEPS, BATCHES = 200, 10, 8

TYPES: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"model": {"compute_dtype": "float32"}}, 0.0),
    "float32_chunks": ({"model": {"compute_dtype": "float32"}, "objective": {"logit_chunk": 32}}, 0.005),
    "bfloat16": ({"model": {"compute_dtype": "bfloat16"}}, 0.03),
    "bfloat16_chunks": ({"model": {"compute_dtype": "bfloat16"}, "objective": {"logit_chunk": 32}}, 0.03),
    "int8": ({"model": {"compute_dtype": "bfloat16", "matrix_products": "int8"}}, 0.05),
    "fp8": ({"model": {"compute_dtype": "bfloat16", "matrix_products": "fp8"}}, 0.05),
}
"""What is changed of the recipe, and how far in nats any validation may be from that of float32."""


def trials(base: Config) -> list[Trial]:
    """Returns the recipe with each type, for 200 steps and with a validation after every tenth."""
    short = replace(
        base,
        train={"num_steps": STEPS},
        evaluation={"every_steps": EVERY_STEPS, "num_batches": BATCHES, "sample_tokens": 0},
        checkpoint={"every_steps": 0},
    )
    return [Trial(name, replace(short, **changes)) for name, (changes, _) in TYPES.items()]


def differences(outcome: Outcome, exact: Outcome) -> list[float]:
    """Returns what each validation is above that of float32 after as many steps."""
    wanted = dict(exact.curve)
    return [loss - wanted[step] for step, loss in outcome.curve if step in wanted]


def _exact(outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    return {outcome.seed: outcome for outcome in outcomes if outcome.name == "float32"}


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns a table of the largest difference of each type, and whether that is within its tolerance."""
    exact, rows = _exact(outcomes), []
    for name, group in by_trial(outcomes).items():
        found = [d for outcome in group if outcome.seed in exact for d in differences(outcome, exact[outcome.seed])]
        largest = max(map(abs, found), default=None)
        kept = "–" if largest is None else "yes" if largest <= TYPES[name][1] else "no"
        last = [outcome.curve[-1][1] for outcome in group if outcome.curve]
        rows.append(
            [
                name.replace("_", ", "),
                "–" if not last else f"{sum(last) / len(last):.4f}",
                "–" if largest is None else f"{largest:.4f}",
                f"{TYPES[name][1]:.3f}",
                kept,
            ]
        )
    header = [
        "products",
        f"validation loss after {STEPS} steps",
        "largest difference on the way",
        "tolerance",
        "within",
    ]
    return f"Nats a token; differences are from float32 after as many steps, of the same seed.\n\n{table(header, rows)}"


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws all learning curves, and how far each is from that of float32."""
    left, right = figure.subplots(1, 2)
    exact = _exact(outcomes)
    for number, (name, group) in enumerate(by_trial(outcomes).items()):
        for outcome in group:
            label = name.replace("_", ", ") if outcome is group[0] else None
            left.plot(*zip(*outcome.curve, strict=True), color=f"C{number}", label=label, linewidth=1.2)
            if outcome.seed in exact and name != "float32":
                steps = [step for step, _ in outcome.curve][: len(exact[outcome.seed].curve)]
                right.plot(steps, differences(outcome, exact[outcome.seed]), color=f"C{number}", linewidth=1.2)
    right.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="optimizer step", ylabel="validation loss (nats a token)")
    right.set(xlabel="optimizer step", ylabel="above float32 (nats a token)")
    left.legend(frameon=False, fontsize=8)


STUDY = Study(trials, report, draw)

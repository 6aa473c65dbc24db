"""The loss curve as a picture."""

import functools
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

from transformer.config import write_atomically
from transformer.training.metrics import read_metrics

MAX_POINTS = 4000
"""Training points drawn: the eye sees no more of them, however long the run."""

TRAIN, VALIDATION = "#2f6db3", "#c8452c"


def draw_loss(metrics_path: Path, png_path: Path, title: str, unit: str = "token") -> bool:
    """Draws the cross-entropy (nats per `unit`), or the squared error, of training and validation over the steps; says whether it could.

    Where matplotlib is missing one message tells so, however often this is called.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError:
        _tell_what_is_missing()
        return False

    records = read_metrics(metrics_path, MAX_POINTS)
    steps, losses = _curve(records, "train")
    validation_steps, validation_losses = _curve(records, "validation")
    if not len(steps) + len(validation_steps):
        return False
    smooth = _smooth(losses)

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=TRAIN, alpha=0.4, linewidth=0.7, marker="." if len(steps) <= 50 else "")
    axes.plot(steps, smooth, color=TRAIN, linewidth=1.6, label=f"training, smoothed{_last(records, 'train', smooth)}")
    if len(validation_steps):
        marker = "o" if len(validation_steps) <= 50 else ""
        label = f"validation{_last(records, 'validation', validation_losses)}"
        axes.plot(validation_steps, validation_losses, color=VALIDATION, marker=marker, markersize=4, label=label)
    # Single spikes must not flatten the curve, but its first point is no spike.
    shown = np.concatenate([losses[:1], np.quantile(losses, [0, 0.995]) if len(losses) else losses, validation_losses])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.05 * (high - low) or 0.1
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    is_error = any("squared_error" in record for record in records[-1:])
    label = "mean squared error" if is_error else f"cross-entropy (nats per {unit})"
    axes.set(xlabel="optimizer step", ylabel=label, ylim=(low - margin, high + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)

    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(png_path, png.getvalue())
    return True


def _curve(records: list[dict[str, Any]], split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and cross-entropies of a split, or its squared errors, without those that are not finite."""
    found = [(r["step"], r.get("cross_entropy", r.get("squared_error"))) for r in records if r["split"] == split]
    kept = [(step, loss) for step, loss in found if loss is not None]
    return np.array([step for step, _ in kept], int), np.array([loss for _, loss in kept], float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Returns the running median over 4% of the points: deaf to spikes. Less near the start, which is steep."""
    radius = [min(i // 4, len(values) // 50) for i in range(len(values))]
    return np.array([np.median(values[i - r : i + r + 1]) for i, r in enumerate(radius)])


def _last(records: list[dict[str, Any]], split: str, losses: np.ndarray) -> str:
    if not len(losses):
        return ""
    bits = [r["bits_per_byte"] for r in records if r["split"] == split and r.get("bits_per_byte") is not None]
    return f" (last {losses[-1]:.3f}{f', {bits[-1]:.3f} bits per byte' if bits else ''})"


@functools.cache
def _tell_what_is_missing() -> None:
    print("No loss plot: matplotlib is not installed (pip install -e '.[plots]')", file=sys.stderr, flush=True)

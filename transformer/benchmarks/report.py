"""What results are shown in: tables in Markdown, and plots where matplotlib is installed."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def save_plot(draw: Callable[[Any], None], path: Path) -> None:
    """Lets `draw` draw into a figure of matplotlib's and writes it as PNG; says so where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed (pip install -e '.[plots]')", file=sys.stderr)
        return
    figure = Figure(figsize=(9, 4.5), dpi=130, layout="constrained")
    draw(figure)
    FigureCanvasAgg(figure).print_png(str(path))

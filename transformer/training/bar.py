"""The progress bar of a terminal."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

SMALLEST_BAR = 10


class Bar(Live):
    """One line at the end of the terminal, with a bar and as many facts, the most important first, as there is room for."""

    def __init__(self, stream: Any, num_steps: int, step: int, facts: Sequence[str]):
        console = Console(file=stream, force_terminal=True, highlight=False)
        # What is meant for a file of its own, 2> errors.txt, must not end up on the terminal.
        super().__init__(self, console=console, redirect_stderr=sys.stderr.isatty())
        self._num_steps, self._shown = num_steps, (step, facts)

    def show(self, step: int, facts: Sequence[str]) -> None:
        """Changes the line, which is drawn again a few times a second."""
        self._shown = (step, facts)

    def message(self, text: str) -> None:
        """Prints text above the bar, to the letter."""
        self.console.print(Text(text), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        step, facts = self._shown[0], list(self._shown[1])
        while len(facts) > 1 and len("  ".join(facts)) + 2 + SMALLEST_BAR > options.max_width:
            facts.pop()
        room = options.max_width - len("  ".join(facts)) - 2
        cells: list[Any] = [Text(fact, no_wrap=True, overflow="crop") for fact in facts]
        if room >= SMALLEST_BAR:
            cells.insert(1, ProgressBar(self._num_steps, step, width=min(room, 40)))
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(*cells)
        yield grid

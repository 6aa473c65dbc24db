"""The console: a progress bar on a terminal, plain lines in a log file. One process shows it."""

import importlib
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal may obey instead of showing it: C0 and C1 controls, and the marks that reorder text."""


class Progress:
    """Shows how far the training is; a context manager.

    `on_terminal` chooses between a bar and lines; None: whatever standard output is. Lines come for the first step,
    the last, and every `log_every_steps`.
    """

    def __init__(self, num_steps: int, start_step: int = 0, on_terminal: bool | None = None, log_every_steps: int = 10):
        self._num_steps, self._start_step, self._log_every_steps = num_steps, start_step, log_every_steps
        self._step, self._record = start_step, {}
        self._first: tuple[int, float] | None = None
        self._stream = sys.stdout
        if on_terminal is None:
            on_terminal = self._stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._bar: Any = None
        if on_terminal:
            bar = importlib.import_module("transformer.training.bar")
            self._bar = bar.Bar(self._stream, num_steps, start_step, self._facts("-:--:-- left"))

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows the newest training record: "step", "loss", "tokens_per_second", perhaps "mfu" (a share)."""
        self._step, self._record, now, left = record["step"], record, time.monotonic(), "-:--:-- left"
        if self._first is None:
            self._first = (self._step, now)
        else:  # counted from the first step's end: its compilation left out, validations and checkpoints included
            each = (now - self._first[1]) / max(1, self._step - self._first[0])
            minutes, seconds = divmod(round(each * (self._num_steps - self._step)), 60)
            left = f"{minutes // 60}:{minutes % 60:02}:{seconds:02} left"
        if self._bar:
            self._bar.show(self._step, self._facts(left))
        due = self._step in (self._start_step + 1, self._num_steps) or self._step % self._log_every_steps == 0
        if due and not self._bar:
            self.message("  ".join(self._facts()))

    def message(self, text: str) -> None:
        """Prints text above the bar to the letter: no markup, and control characters made visible."""
        encoding = self._stream.encoding or "utf-8"
        text = CONTROL.sub(lambda match: repr(match.group())[1:-1], text)
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        if self._bar:
            self._bar.message(text)
        else:
            print(text, file=self._stream, flush=True)

    def _facts(self, *time_left: str) -> list[str]:
        """Returns what there is to show, the most important first."""
        formats = (("loss", "loss {:.3f}"), ("tokens_per_second", "{:,.0f} tokens/s"), ("mfu", "MFU {:.1%}"))
        known = [text.format(self._record[name]) for name, text in formats if self._record.get(name) is not None]
        return [f"step {self._step}/{self._num_steps}", *known[:1], *time_left, *known[1:]]

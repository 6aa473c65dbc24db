import io
import os
import re
import sys
from collections.abc import Callable

import pytest

from transformer.training import progress
from transformer.training.progress import Progress

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Stream(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", terminal: bool = False):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


@pytest.fixture
def replace_stdout(monkeypatch) -> Callable[..., Stream]:
    """To be called in the test itself, since pytest puts its own standard output there when a test begins."""

    def replace(columns: int = 100, term: str = "xterm", **arguments) -> Stream:
        for name in ("NO_COLOR", "FORCE_COLOR", "LINES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(sys, "stdout", Stream(**arguments))
        return sys.stdout  # type: ignore[return-value]

    return replace


def record(step: int, **more) -> dict:
    return {"step": step, "split": "train", "loss": 3.21449, "tokens_per_second": 12345.4, **more}


def frames(text: str) -> list[str]:
    """What stood in the bar's line, one entry for each time that it was drawn."""
    return [frame.strip("\r") for frame in re.split(r"\r|\n", ESCAPE.sub("", text)) if frame.startswith("step")]


def test_plain_lines_come_at_the_interval_and_at_both_ends(replace_stdout):
    stream = replace_stdout()
    with Progress(1000, 118, log_every_steps=20) as shown:
        for step in (119, 120, 121, 140, 1000):
            shown.update(record(step))
    rest = "loss 3.214  12,345 tokens/s\n"
    assert stream.text == "".join(f"step {step}/1000  {rest}" for step in (119, 120, 140, 1000))


def test_mfu_is_shown_only_when_it_is_known(replace_stdout):
    stream = replace_stdout()
    with Progress(2) as shown:
        shown.update(record(1, mfu=0.4123))
        shown.update(record(2, mfu=None))
    assert stream.text == "step 1/2  loss 3.214  12,345 tokens/s  MFU 41.2%\nstep 2/2  loss 3.214  12,345 tokens/s\n"


def test_a_loss_that_is_not_finite_is_shown(replace_stdout):
    stream = replace_stdout()
    with Progress(1) as shown:
        shown.update(record(1, loss=float("nan")))
    assert stream.text.startswith("step 1/1  loss nan  ")


@pytest.mark.parametrize("on_terminal", [False, True])
def test_text_is_shown_to_the_letter(replace_stdout, on_terminal):
    stream = replace_stdout(columns=40)
    text = "[bold]not markup[/bold] :smile: [link=x]\n  \\[red] 漢字 é " + "long " * 20
    with Progress(1, on_terminal=on_terminal) as shown:
        shown.message(text)
    assert text in ESCAPE.sub("", stream.text)


@pytest.mark.parametrize("on_terminal", [False, True])
def test_control_characters_are_made_visible(replace_stdout, on_terminal):
    stream = replace_stdout()
    with Progress(1, on_terminal=on_terminal) as shown:
        shown.message("a\x1b[31mb\x07\r\x00\x7f\x9b1m\u202ec\ud800|")
    assert r"a\x1b[31mb\x07\r\x00\x7f\x9b1m\u202ec\ud800|" in stream.text
    if not on_terminal:
        assert not set(stream.text) & set("\x1b\x07\r\x00\x7f\x9b\u202e")


@pytest.mark.parametrize("on_terminal", [False, True])
def test_an_encoding_without_the_characters_is_no_error(replace_stdout, on_terminal):
    stream = replace_stdout(encoding="ascii")
    with Progress(3, on_terminal=on_terminal) as shown:
        shown.message("naïve →")
        shown.update(record(1))
    assert r"na\xefve \u2192" in stream.text and "step 1/3" in stream.text


@pytest.mark.parametrize("terminal, term, bar", [(True, "xterm", True), (True, "dumb", False), (False, "xterm", False)])
def test_standard_output_decides(replace_stdout, monkeypatch, terminal, term, bar):
    stream = replace_stdout(term=term, terminal=terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")  # set by many CI systems, whose logs take no cursor movements
    with Progress(10) as shown:
        shown.update(record(1))
    assert ("\x1b[" in stream.text) == bar
    assert "step 1/10" in stream.text


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals")
def test_a_real_terminal_gets_a_bar(monkeypatch):
    ours, theirs = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with Progress(10) as shown:
            shown.update(record(7))
            shown.message("said")
        shown_bytes = b""
        while not shown_bytes.endswith(b"\x1b[?25h"):  # a pseudo-terminal hands over what was written in pieces
            shown_bytes += os.read(ours, 1 << 16)
        text = shown_bytes.decode()
    os.close(ours)
    assert frames(text)[-1].startswith("step 7/10  ━") and "said\r\n" in text
    assert text.count("\x1b[?25l") == 1, "the cursor is hidden meanwhile"


@pytest.mark.parametrize(
    "columns, expected",
    [
        (100, ("━", "loss 3.214", "left", "12,345 tokens/s", "MFU 41.2%")),
        (60, ("━", "loss 3.214", "left")),
        (40, ("━", "loss 3.214")),
        (12, ()),
    ],
)
def test_narrow_terminals_lose_the_least_important_first(replace_stdout, columns, expected):
    stream = replace_stdout(columns)
    with Progress(1000, on_terminal=True) as shown:
        shown.update(record(120, mfu=0.412))
    lines = frames(stream.text)
    assert all(len(line) <= columns for line in lines)
    every = ("━", "loss 3.214", "left", "12,345 tokens/s", "MFU 41.2%")
    assert lines[-1].startswith("step 120/1000"[:columns])
    assert [part for part in every if part in lines[-1]] == list(expected)


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected(replace_stdout, monkeypatch, no_color):
    stream = replace_stdout()
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with Progress(10, on_terminal=True) as shown:
        shown.update(record(5))
    colours = re.findall(r"\x1b\[[0-9;]*(?:3|9)[0-7][0-9;]*m|\x1b\[38;[0-9;]*m", stream.text)
    assert bool(colours) != no_color


def test_time_left_leaves_out_the_compilation(replace_stdout, monkeypatch):
    clock = iter([1000.0, 1002.0, 1010.0])  # the first step ends long after the start; then 2 s, and 8 s for two
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    shown = Progress(2005, on_terminal=True)
    seen = []
    for step in (1, 2, 4):
        shown.update(record(step))
        seen += [fact for fact in shown._bar._shown[1] if fact.endswith(" left")]
    # 2 s a step for 2003 steps, then 10/3 s a step for 2001.
    assert seen == ["-:--:-- left", "1:06:46 left", "1:51:10 left"]


def test_the_bar_ends_when_an_error_passes_through(replace_stdout):
    stream = replace_stdout()
    with pytest.raises(KeyError), Progress(10, on_terminal=True) as shown:
        shown.update(record(5))
        raise KeyError("x")
    assert stream.text.endswith("\x1b[?25h") and sys.stdout is stream

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import transformer
from transformer.training import plots
from transformer.training.metrics import MetricsLog
from transformer.training.plots import draw_loss

pytest.importorskip("matplotlib")


def write_log(path: Path, losses: list[float], validate_every: int = 10) -> Path:
    log = MetricsLog(path, 0)
    for step, loss in enumerate(losses, 1):
        log.write({"step": step, "split": "train", "loss": loss + 1, "cross_entropy": loss})
        if step % validate_every == 0:
            more = {"cross_entropy": loss + 0.5, "bits_per_byte": loss / 2}
            log.write({"step": step, "split": "validation", "loss": 0.0, **more})
    log.close()
    return path


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures drawn, as seen when they are written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    seen = []
    real = FigureCanvasAgg.print_png

    def print_png(canvas, *arguments):
        seen.append(canvas.figure)
        real(canvas, *arguments)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    return seen


def curves(figure) -> SimpleNamespace:
    lines = figure.axes[0].lines
    names = ("raw", "smooth", "validation")
    return SimpleNamespace(**{n: np.array(line.get_data()) for n, line in zip(names, lines, strict=False)})


def test_draws_training_and_validation_with_units(tmp_path, figures):
    losses = [3 - step / 100 for step in range(100)]
    assert draw_loss(write_log(tmp_path / "m.jsonl", losses), tmp_path / "out" / "loss.png", "run $1 & $2") is True
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == "optimizer step" and axes.get_ylabel() == "cross-entropy (nats per token)"
    assert axes.get_title("left") == "run $1 & $2"
    drawn = curves(figures[0])
    np.testing.assert_array_equal(drawn.raw, [np.arange(1, 101), losses])
    np.testing.assert_allclose(drawn.validation, [np.arange(10, 101, 10), np.array(losses[9::10]) + 0.5])
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels[1] == "validation (last 2.510, 1.005 bits per byte)"
    png = (tmp_path / "out" / "loss.png").read_bytes()
    assert png.startswith(b"\x89PNG") and png.endswith(b"IEND\xaeB`\x82")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss.png"], "no temporary file is left"


def test_a_spike_does_not_flatten_the_curve_but_the_start_is_shown(tmp_path, figures):
    losses = [8.0] + [2.0] * 999
    losses[500] = 1000.0
    draw_loss(write_log(tmp_path / "m.jsonl", losses), tmp_path / "loss.png", "t", "text")
    assert figures[0].axes[0].get_ylabel() == "cross-entropy (nats per text)"
    low, high = figures[0].axes[0].get_ylim()
    assert low < 2 and 8 < high < 10
    assert np.all(curves(figures[0]).smooth[1][50:] == 2)


def test_not_finite_losses_are_left_out(tmp_path, figures):
    draw_loss(write_log(tmp_path / "m.jsonl", [3.0, float("nan"), 1.0, float("inf")]), tmp_path / "loss.png", "t")
    np.testing.assert_array_equal(curves(figures[0]).raw, [[1, 3], [3.0, 1.0]])


def test_long_logs_are_thinned_up_to_the_last_step(tmp_path, figures, monkeypatch):
    monkeypatch.setattr(plots, "MAX_POINTS", 100)
    draw_loss(write_log(tmp_path / "m.jsonl", list(np.linspace(4, 1, 1999)), 100), tmp_path / "loss.png", "t")
    drawn = curves(figures[0])
    assert 50 <= drawn.raw.shape[1] <= 100 and drawn.raw[0, -1] == 1999
    assert drawn.validation.shape[1] == 19


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_first_steps_can_be_drawn(tmp_path, figures, num_steps):
    path = write_log(tmp_path / "m.jsonl", [2.0] * num_steps)
    assert draw_loss(path, tmp_path / "loss.png", "t")
    assert curves(figures[0]).smooth.shape == (2, num_steps)


def test_nothing_to_draw_draws_nothing(tmp_path):
    assert draw_loss(write_log(tmp_path / "m.jsonl", [float("nan")]), tmp_path / "loss.png", "t") is False
    assert not (tmp_path / "loss.png").exists()


def test_an_existing_plot_survives_a_failure(tmp_path, monkeypatch):
    path = write_log(tmp_path / "m.jsonl", [2.0, 1.0])
    draw_loss(path, tmp_path / "loss.png", "t")
    before = (tmp_path / "loss.png").read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        draw_loss(path, tmp_path / "loss.png", "another title")
    assert (tmp_path / "loss.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "m.jsonl"]


def test_missing_matplotlib_is_told_once(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    plots._tell_what_is_missing.cache_clear()
    for _ in range(3):
        assert draw_loss(tmp_path / "m.jsonl", tmp_path / "loss.png", "t") is False
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "matplotlib" in error and "'.[plots]'" in error


def test_neither_pyplot_nor_a_display_is_needed(tmp_path):
    path = write_log(tmp_path / "m.jsonl", [2.0, 1.0])
    program = (
        "import sys; from pathlib import Path; from transformer.training.plots import draw_loss\n"
        "drawn = draw_loss(Path(sys.argv[1]), Path(sys.argv[2]), 't')\n"
        "print(drawn, [m for m in ('matplotlib.pyplot', 'tkinter', 'jax') if m in sys.modules])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    root = str(Path(transformer.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", program, str(path), str(tmp_path / "loss.png")],
        env={**environment, "PYTHONPATH": root, "MPLBACKEND": "TkAgg"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "True []\n"

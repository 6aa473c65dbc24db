import importlib.util
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import transformer
from transformer.config import Config, ConfigError, replace
from transformer.training.tensorboard import TensorBoard
from transformer.training.trackers import TRACKERS, trackers
from transformer.training.weights_and_biases import WeightsAndBiases

needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboardX"), reason="extra tracking")
needs_wandb = pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="extra tracking")


def events(workdir: Path) -> list:
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        assert "tfevents" in path.name
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked_crc32c(data[12 : 12 + length]),)
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))  # pyright: ignore[reportAttributeAccessIssue]
            data = data[16 + length :]
    return found


def scalars(workdir: Path) -> list[tuple[int, str, float]]:
    return [
        (e.step, v.tag, v.simple_value) for e in events(workdir) for v in e.summary.value if not v.HasField("tensor")
    ]


@needs_tensorboard
def test_tensorboard_events_carry_every_number_under_its_split(tmp_path):
    [tracker] = trackers(Config(), tmp_path, 0)
    tracker.log({"step": 1, "split": "train", "loss": 0.5, "tokens": 64})
    tracker.log({"step": 1, "split": "validation", "loss": 0.25, "note": "text is left out"})
    tracker.sync()
    expected = [(1, "train/loss", 0.5), (1, "train/tokens", 64), (1, "validation/loss", 0.25)]
    assert scalars(tmp_path) == expected
    tracker.log({"step": 2, "split": "train", "loss": float("nan")})
    tracker.close()
    assert [(step, tag) for step, tag, _ in scalars(tmp_path)][3:] == [(2, "train/loss")]


@needs_tensorboard
def test_tensorboard_resume_keeps_the_old_file_and_hides_what_came_after(tmp_path):
    for resume_step in (0, 10, 10):
        tracker = TensorBoard(Config(), tmp_path, resume_step)
        tracker.log({"step": resume_step + 1, "split": "train", "loss": 1.0})
        tracker.close()
    versions = [e.file_version for e in events(tmp_path) if e.file_version]
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert versions == ["brain.Event:2"] * 3
    assert starts == [0, 11, 11], "SessionLog.START hides events of its step and later, in earlier files only"
    assert [step for step, _, _ in scalars(tmp_path)] == [1, 11, 11]


@needs_tensorboard
def test_tensorboard_shows_samples_literally(tmp_path):
    tracker = TensorBoard(Config(), tmp_path, 0)
    tracker.text(3, "# not a heading\n*x* \ud800")
    tracker.close()
    (value,) = [v for e in events(tmp_path) for v in e.summary.value]
    assert value.tensor.string_val[0].decode() == "    # not a heading\n    *x* \\ud800"
    assert value.metadata.plugin_data.plugin_name == "text"


@needs_tensorboard
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_tensorboard_fails_loudly_on_a_full_disk(tmp_path, monkeypatch):
    tracker = TensorBoard(Config(), tmp_path, 0)
    monkeypatch.setattr(tracker._writer, "_writer", open("/dev/full", "wb", buffering=0))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"step": 1, "split": "train", "loss": 1.0})


@pytest.mark.parametrize("key, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_missing_package_names_key_and_extra(tmp_path, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    config = replace(Config(), tracking={"tensorboard": False, "wandb": False, key: True})
    with pytest.raises(ConfigError) as raised:
        trackers(config, tmp_path, 0)
    assert all(word in str(raised.value) for word in (f"tracking.{key}", package, "pip install -e '.[tracking]'"))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_imported_or_written_when_switched_off(tmp_path, monkeypatch):
    for package in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    off = trackers(replace(Config(), tracking={"tensorboard": False, "wandb": False}), tmp_path, 0)
    assert off == [] and list(tmp_path.iterdir()) == []


def test_every_tracker_is_switched_by_a_key_of_the_configuration():
    assert all(isinstance(getattr(Config().tracking, key), bool) for key in TRACKERS)


@needs_wandb
def test_wandb_offline_keeps_its_run_id_over_a_resume(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = replace(Config(), tracking={"tensorboard": False, "wandb": True})
    for resume_step in (0, 4):
        [tracker] = trackers(config, tmp_path, resume_step)
        tracker.log({"step": resume_step + 1, "split": "train", "loss": 0.5})
        tracker.text(resume_step + 1, "<b>")
        tracker.close()
    run_id = (tmp_path / "wandb_run_id").read_text()
    logs = list(tmp_path.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(logs) == 2
    # wandb's own process may still be writing when `finish` comes back.
    deadline = time.monotonic() + 60
    while not (written := all(b"train/loss" in log.read_bytes() for log in logs)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert written
    samples = [path.read_text() for path in tmp_path.glob("wandb/offline-run-*/files/media/html/*.html")]
    assert samples == ["<pre>&lt;b&gt;</pre>"] * 2


@needs_wandb
def test_wandb_resumed_run_leaves_out_steps_that_the_service_has(tmp_path, monkeypatch):
    import wandb

    logged, arguments = [], {}
    run = SimpleNamespace(starting_step=7, log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    monkeypatch.setattr(wandb, "init", lambda **given: arguments.update(given) or run)
    tracker = WeightsAndBiases(Config(), tmp_path, 5)
    for step in range(6, 9):
        tracker.log({"step": step, "split": "train", "loss": step / 2})
    assert logged == [(7, {"train/loss": 3.5}), (8, {"train/loss": 4.0})]
    assert arguments["resume"] == "allow" and arguments["id"] == (tmp_path / "wandb_run_id").read_text()


@needs_wandb
def test_wandb_without_an_account_is_a_config_error(tmp_path, monkeypatch):
    import wandb

    def refuse(**_):
        raise wandb.Error("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ConfigError, match=r"tracking\.wandb.*No API key.*WANDB_MODE=offline"):
        WeightsAndBiases(Config(), tmp_path, 0)


@needs_tensorboard
def test_no_framework_is_imported(tmp_path):
    program = (
        "import sys; from pathlib import Path; from transformer.config import Config\n"
        "from transformer.training import metrics, plots, progress, trackers\n"
        "light = 'matplotlib' not in sys.modules and 'tensorboardX' not in sys.modules\n"
        "[t.close() for t in trackers.trackers(Config(), Path(sys.argv[1]), 0)]\n"
        "print(light, [m for m in ('jax', 'flax', 'tensorflow', 'matplotlib', 'wandb') if m in sys.modules])"
    )
    root = str(Path(transformer.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "True []\n"

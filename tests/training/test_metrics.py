import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import transformer
from transformer.training.metrics import MetricsLog, read_metrics


def train(step: int, loss: Any = 1.5) -> dict:
    return {"step": step, "split": "train", "loss": loss}


def validation(step: int) -> dict:
    return {"step": step, "split": "validation", "loss": 2.5}


def steps(path: Path) -> list[tuple[int, str]]:
    return [(record["step"], record["split"]) for record in read_metrics(path)]


def filled(path: Path, last: int = 6) -> Path:
    log = MetricsLog(path, 0)
    for step in range(1, last + 1):
        log.write(train(step))
        if step % 2 == 0:
            log.write(validation(step))
    log.close()
    return path


def test_floats_read_back_bit_equal(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(3.2141)), 12345678.9]
    log = MetricsLog(tmp_path / "new" / "metrics.jsonl", 0)
    for step, value in enumerate(values, 1):
        log.write(train(step, value))
    log.sync()
    got = [record["loss"] for record in read_metrics(tmp_path / "new" / "metrics.jsonl")]
    assert [x.hex() for x in got] == [x.hex() for x in values]


def test_numpy_numbers_are_accepted_exactly(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write({"step": np.int64(1), "split": "train", "loss": np.float32(0.1), "tokens": np.array(7)})
    assert read_metrics(tmp_path / "m.jsonl") == [
        {"step": 1, "split": "train", "loss": float(np.float32(0.1)), "tokens": 7}
    ]


def test_not_finite_is_null_so_that_strict_readers_take_it(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    for step, value in enumerate([float("nan"), float("inf"), np.float32("-inf")], 1):
        log.write(train(step, value))

    def refuse(constant: str):
        raise AssertionError(constant)

    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in lines] == [None] * 3


@pytest.mark.parametrize("resume_step", range(1, 8))
def test_resume_drops_exactly_the_later_steps(tmp_path, resume_step):
    path = filled(tmp_path / "m.jsonl")
    before = steps(path)
    MetricsLog(path, resume_step).close()
    assert steps(path) == [(step, split) for step, split in before if step <= resume_step]


def test_starting_over_empties_the_file(tmp_path):
    path = filled(tmp_path / "m.jsonl")
    MetricsLog(path, 0).write(train(1, 9.0))
    assert read_metrics(path) == [train(1, 9.0)]


@pytest.mark.parametrize("tail", [b'{"step": 7, "sp', b"\0" * 100, b"\0" * 50 + b"\n", b'{"step": 7}'])
def test_torn_last_line_is_dropped(tmp_path, tail):
    path = filled(tmp_path / "m.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    MetricsLog(path, 6).close()
    assert path.read_bytes() == whole


def test_every_possible_tear_resumes_to_the_same_file(tmp_path):
    path = filled(tmp_path / "m.jsonl")
    whole = path.read_bytes()
    kept = b"".join(line for line in whole.splitlines(True) if json.loads(line)["step"] <= 2)
    for size in range(len(kept), len(whole)):
        path.write_bytes(whole[:size])
        log = MetricsLog(path, 2)
        for step in range(3, 7):
            log.write(train(step))
            if step % 2 == 0:
                log.write(validation(step))
        log.close()
        assert path.read_bytes() == whole


def test_nothing_is_written_when_nothing_changes(tmp_path):
    path = filled(tmp_path / "m.jsonl")
    os.utime(path, ns=(1, 1))
    MetricsLog(path, 6).close()
    assert path.stat().st_mtime_ns == 1


def test_damage_among_kept_lines_is_not_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps(train(1)) + "\n{broken\n" + json.dumps(train(2)) + "\n")
    with pytest.raises(ValueError):
        MetricsLog(path, 2)


def test_the_same_step_twice_is_refused(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write(train(1))
    log.write(validation(1))
    for record in (train(1), validation(1)):
        with pytest.raises(AssertionError, match="already written"):
            log.write(record)
    log.write(train(2))
    with pytest.raises(AssertionError, match="after step 2"):
        log.write(validation(1))
    assert steps(tmp_path / "m.jsonl") == [(1, "train"), (1, "validation"), (2, "train")]


def test_the_same_step_twice_is_refused_after_a_resume(tmp_path):
    log = MetricsLog(filled(tmp_path / "m.jsonl"), 4)
    with pytest.raises(AssertionError, match="already written"):
        log.write(train(4))
    log.write(train(5))
    assert steps(tmp_path / "m.jsonl")[-1] == (5, "train")


def test_a_validation_done_again_after_a_resume_is_the_line_that_is_there(tmp_path):
    path = filled(tmp_path / "m.jsonl")
    before = [step for step in steps(path) if step[0] <= 4]
    log = MetricsLog(path, 4)
    log.write(validation(4))
    log.write(train(5))
    log.write(validation(5))
    assert steps(path) == [*before, (5, "train"), (5, "validation")]
    with pytest.raises(AssertionError, match="already written"):
        log.write(validation(5))


def test_only_the_end_of_a_long_log_is_read(tmp_path):
    path = filled(tmp_path / "m.jsonl", 2000)
    good = path.read_bytes()
    # An unreadable beginning goes unnoticed only if the scan stops where it should.
    path.write_bytes(b"!" * 1000 + good[1000:])
    MetricsLog(path, 1990).close()
    assert path.stat().st_size == good.index(b'{"step": 1991,')


def test_sigkill_loses_no_written_line(tmp_path):
    path = tmp_path / "m.jsonl"
    program = (
        "import sys; from pathlib import Path; from transformer.training.metrics import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]), 0)\n"
        "for step in range(1, 6): log.write({'step': step, 'split': 'train', 'loss': step / 3})\n"
        "print('written', flush=True); sys.stdin.read()"
    )
    root = str(Path(transformer.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert [record["loss"] for record in read_metrics(path)] == [step / 3 for step in range(1, 6)]


def test_thinned_reading_keeps_the_last_step_and_all_validations(tmp_path):
    path = filled(tmp_path / "m.jsonl", 1001)
    records = read_metrics(path, max_train=50)
    assert [r["step"] for r in records if r["split"] == "validation"] == list(range(2, 1001, 2))
    kept = [r["step"] for r in records if r["split"] == "train"]
    assert kept[-1] == 1001 and 10 <= len(kept) <= 50 and kept == sorted(set(kept))
    with path.open("ab") as file:
        file.write(b'{"step": 1002')
    assert steps(path)[-1] == (1001, "train")

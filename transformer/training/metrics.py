"""`metrics.jsonl`: one JSON object a line, each (step, split) exactly once, also after a crash.

The loop writes the line of every step, and calls `sync` before it commits a checkpoint. So all lines up to the
step of a checkpoint are on disk, and whatever follows them is dropped when a run resumes there.
"""

import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

SCORES = {
    **{"squared_error": "squared error", "pearson": "Pearson", "spearman": "Spearman", "exact_match": "exact match"},
    **{"f1": "F1", "f1_macro": "F1 (macro)", "matthews": "Matthews"},
}
"""What tasks are measured by, besides losses and accuracy, in words."""


class MetricsLog:
    """Appends records to `path`.

    `resume_step` is the step of the restored checkpoint; 0 starts with an empty file. Floats read back bit-equal.
    NaN and infinities, which JSON lacks, are written as null: a missing number to every reader.
    """

    def __init__(self, path: Path, resume_step: int):
        self._resume_step = resume_step
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            size = file.seek(0, os.SEEK_END)
            kept, self._step, self._splits = _last_kept(file, resume_step) if size and resume_step else (0, 0, set())
            # Cutting the end off is one operation of the file system: as atomic as a rename, and fast for any length.
            if kept < size:
                file.truncate(kept)
                os.fsync(file.fileno())
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line; `record` has "step" (never less than before), "split", and numbers or strings."""
        step, split = record["step"], record["split"]
        assert step >= self._step, f"step {step} comes after step {self._step}"
        if step > self._step:
            self._step, self._splits = step, set()
        if step == self._resume_step and split in self._splits and split != "train":
            return  # validated after the checkpoint that a kill has sent us back to
        assert split not in self._splits, f"step {step} of split {split!r} is already written"
        line = json.dumps({name: _plain(value) for name, value in record.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._splits.add(split)

    def sync(self) -> None:
        """Returns when every line is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; writing afterwards is an error."""
        self._file.close()


def read_metrics(path: Path, max_train: int | None = None) -> list[dict[str, Any]]:
    """Returns the records in order, without a torn last line; numbers that were not finite are None.

    With `max_train`, about that many training records at most, evenly spaced up to the last; the rest is not parsed.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    stride = math.ceil(len(lines) / max_train) if max_train else 1
    if stride > 1:
        last = len(lines) - 1
        lines = [x for i, x in enumerate(lines) if (last - i) % stride == 0 or b'"split": "train"' not in x]
    return [json.loads(line) for line in lines]


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value  # NumPy's numbers are not JSON's
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _last_kept(file: BinaryIO, resume_step: int) -> tuple[int, int, set[str]]:
    """Returns where the lines up to `resume_step` end, and the step and the splits of the last of them."""
    kept, last_step, splits = 0, 0, set[str]()
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            try:
                record = json.loads(text[start:end])
            except ValueError:  # torn, or zeros after a power failure: later than any checkpoint, so dropped
                if kept:
                    raise
                record = None
            if record is not None and record["step"] <= resume_step:
                if record["step"] < last_step:
                    break
                kept, last_step = max(kept, end), record["step"]
                splits.add(record["split"])
            end = start
    return kept, last_step, splits

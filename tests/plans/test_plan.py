"""One small step compiled for TPUs that are not here, in a process of its own, where libtpu is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--config", "stdlib", "--model.num-layers", "2", "--model.width", "64", "--model.num-heads", "2"),
    *(
        "--data.sequence-length",
        "128",
        "--model.compute-dtype",
        "bfloat16",
        "--model.attention-implementation",
        "blockwise",
    ),
    *("--train.batch-size", "8", "--train.num-microbatches", "1", "--evaluation.batch-size", "8"),
    # Tied, the table would have two gradients, each summed over slices before they are added.
    *("--model.tied-embeddings", "False"),
]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is not installed")
def test_a_step_on_two_slices(tmp_path: Path) -> None:
    result = tmp_path / "plan.json"
    flags = ["--topology", "v5e:2x2", "--slices", "2", "--json", str(result), "--tokens", "1e9"]
    program = "from transformer.cli import main; main()"
    # The suite's own devices and flags are not the plan's.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment |= {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, "plan", *SMALL, *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "8 chips" in done.stdout and "chip-hours" in done.stdout
    record = json.loads(result.read_text())
    assert record["axes"] == {"replica": 2, "stage": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    crossing = [item for item in record["collectives"] if item["crosses_slices"]]
    assert crossing and all(item["axes"] == ["replica"] for item in crossing), "only the replicas meet over the network"
    # The gradient's shard of each chip: matrices in 16 bits, the table of embeddings in 32; five norms and two scalars in tiles.
    held = record["memory_bytes"]["parameters"]
    sent = sum(item["bytes"] * item["count"] for item in crossing)
    table, vectors = 4 * 4096 * 64 / 4, 4 * 5 * 64
    assert sent == (held - table - vectors) / 2 + table + (5 + 2) * 512
    assert record["memory_bytes"]["optimizer_state"] == pytest.approx(2 * held, rel=0.01)
    assert record["fits"] and 0 < record["prediction"]["mfu"] < 1

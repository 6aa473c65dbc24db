"""Trains a recipe with several seeds and writes down what it reached: cross-entropy of the whole validation split.

    python benchmarks/recipes.py shakespeare_char_cpu --seeds 0 1 2 --data.path tiny_shakespeare.txt

Each run is `train.py`, as a user starts it, with its wall time from start to exit. Further options go to it as they
are. The mean is over the evaluations in the last tenth of a run. Results go to benchmarks/results/.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def train(recipe: str, seed: int, options: list[str]) -> dict[str, Any]:
    """Trains one run and returns its result."""
    with tempfile.TemporaryDirectory() as directory:
        workdir = Path(directory) / recipe
        command = [sys.executable, str(ROOT / "train.py"), "--config", recipe, "--workdir", str(workdir)]
        start = time.monotonic()
        subprocess.run([*command, "--seed", str(seed), *options], check=True, stdout=sys.stderr)
        seconds = time.monotonic() - start
        records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last_step = records[-1]["step"]
    evaluations = [r for r in records if r["split"] == "validation"]
    tail = [r["cross_entropy"] for r in evaluations if r["step"] > 0.9 * last_step]
    return {
        "seed": seed,
        "steps": last_step,
        "tokens": sum(r["tokens"] for r in records if r["split"] == "train"),
        "wall_seconds": round(seconds, 1),
        "evaluations_in_last_tenth": len(tail),
        "mean_cross_entropy_of_last_tenth": statistics.mean(tail),
        "final_cross_entropy": evaluations[-1]["cross_entropy"],
        "final_bits_per_byte": evaluations[-1]["bits_per_byte"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments, options = parser.parse_known_args()
    runs = [train(arguments.recipe, seed, options) for seed in arguments.seeds]
    # A path says where this machine keeps a file; its name says which file it is.
    shown = [Path(option).name if os.sep in option else option for option in options]
    seeds = " ".join(map(str, arguments.seeds))
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/recipes.py {arguments.recipe} --seeds {seeds} {' '.join(shown)}".strip(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}
        | {"python": platform.python_version()},
        "mean_of_seeds": statistics.mean(run["mean_cross_entropy_of_last_tenth"] for run in runs),
        "runs": runs,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{result['date']}-{arguments.recipe}-jax{result['versions']['jax']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}: {result['mean_of_seeds']:.4f} nats a token, mean of {len(runs)} seeds")


if __name__ == "__main__":
    main()

"""Predicted steps beside those that others have published for the same shape, chip and batch.

    python benchmarks/published.py --output benchmarks/results/DATE-published.json
    python benchmarks/published.py --output benchmarks/results/DATE-published.json --compile

The first predicts by arithmetic alone; the second compiles each step for its topology, minutes a row. What is recomputed
differs: the published runs keep, or keep on the host, some products of each layer, so that theirs lies between our `dots`
and `full`. Errors are of the predicted time: above 0, the published step is the faster.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.arguments import load_config
from transformer.benchmarks.measure import machine
from transformer.benchmarks.report import table
from transformer.config import Config, replace
from transformer.plans.arithmetic import estimate
from transformer.plans.chips import Topology, parse_topology

TIERS = "MaxText docs/reference/models/tiering.md (August 2026): tokens/s a chip; batch from the recipe that it links"
AXLEARN = "AXLearn, arXiv:2507.05411, iteration times; batch of 1,024 texts of 4,096 tokens assumed, which its MFU agrees with"
LLAMA2_70B = {"vocab_size": 32_000, "rotary_base": 10_000.0}


@dataclass(frozen=True)
class Published:
    """A step that somebody has measured."""

    name: str
    recipe: str
    topology: str
    length: int
    batch: int
    step_seconds: float
    source: str
    model: Any = None


RUNS = (
    Published("Llama 3.1 8B, v6e-256", "llama3_8b", "v6e:16x16", 8192, 4 * 256, 4 * 8192 / 7207, TIERS),
    Published("Llama 3.1 70B, v6e-256", "llama3_70b", "v6e:16x16", 8192, 5 * 256, 5 * 8192 / 960, TIERS),
    # The table says 512 chips and its recipe v5p-128; v5p counts two cores a chip. Only the time of a chip's texts enters.
    Published("Llama 2 70B, v5p-512", "llama3_70b", "v5p:4x8x8", 4096, 2 * 256, 2 * 4096 / 692, TIERS, LLAMA2_70B),
    Published("Llama 2 7B, v5p-512", "llama2_7b", "v5p:4x8x8", 4096, 1024, 2.5, AXLEARN),
    Published("Llama 2 70B, v5p-1024", "llama3_70b", "v5p:8x8x8", 4096, 1024, 11.6, AXLEARN, LLAMA2_70B),
)


def configured(run: Published, remat: str) -> tuple[Config, Topology]:
    config = load_config(run.recipe)[0]
    batch = {"batch_size": run.batch, "num_microbatches": 1}
    config = replace(
        config,
        data={"sequence_length": run.length},
        model={"remat": remat, **(run.model or {})},
        train=batch,
        evaluation={"batch_size": run.batch},
        parallel={"fsdp": -1, "tensor": 1},
    )
    return config, parse_topology(run.topology)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", required=True)
    parser.add_argument("--compile", action="store_true", help="compile each step instead of the arithmetic")
    parser.add_argument("--only", default="", help="runs whose names hold this")
    given = parser.parse_args()
    rows, records = [], []
    for run in (run for run in RUNS if given.only in run.name):
        record: dict[str, Any] = {"name": run.name, "published_seconds": run.step_seconds, "source": run.source}
        for remat in ("full", "dots"):
            config, topology = configured(run, remat)
            if given.compile:
                from transformer.plans.compilation import compile_for, prepare
                from transformer.plans.roofline import predict

                prepare(topology.chip, config)
                compiled = compile_for(config, topology)
                seconds = predict(compiled).step_seconds if compiled.fits else None
                size = compiled.memory.total
            else:
                found = estimate(config, topology)
                seconds, size = found.seconds.step_seconds, found.bytes
            record[remat] = {"seconds": seconds, "bytes": size, "hbm_bytes": topology.chip.hbm_bytes}
            if seconds is not None:
                record[remat]["error"] = seconds / run.step_seconds - 1
        records.append(record)
        shown = []
        for one in (record["full"], record["dots"]):
            size = f"{one['bytes'] / 1e9:.0f} of {one['hbm_bytes'] / 1e9:.0f} GB"
            shown.append(f"{one['seconds']:.3g} s ({one['error']:+.0%}), {size}" if one["seconds"] else "does not fit")
        rows.append((run.name, f"{run.step_seconds:.3g} s", *shown))
    print(table(("", "published", "predicted, full", "predicted, dots"), rows))
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "runs": records}
    Path(given.output).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

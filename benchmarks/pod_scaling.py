"""Weak scaling by compilation: one model, as many texts on each chip, on more and more chips; nothing is run.

    python benchmarks/pod_scaling.py --output benchmarks/results/DATE-pod-scaling

writes OUTPUT.json and OUTPUT.png: memory of each chip, what it sends over each kind of link in a step, and the predicted step.
Options after `--` go to `transformer plan`, such as another recipe.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformer.benchmarks.measure import machine, own_process
from transformer.benchmarks.report import save_plot, table

POINTS = (("v5e:4x4", 1), ("v5e:8x8", 1), ("v5e:16x16", 1), ("v5e:16x16", 4), ("v5e:16x16", 16))
"""16 to 4,096 chips."""
MODEL = (
    *("--config", "llama2_7b", "--model.num-layers", "4", "--model.width", "1024", "--model.num-heads", "8"),
    *("--model.feedforward-width", "2816", "--data.sequence-length", "1024"),
)


def plan(topology: str, slices: int, rows: int, options: list[str]) -> dict[str, Any]:
    """Returns the plan with `rows` texts on each chip."""
    x, y = map(int, topology.partition(":")[2].split("x"))
    batch = str(x * y * slices * rows)
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "plan.json"
        flags = ["--topology", topology, "--slices", str(slices), "--train.batch-size", batch, "--json", str(result)]
        flags += ["--train.num-microbatches", "1", "--evaluation.batch-size", batch]
        command, environment = own_process("from transformer.cli import main; main()", ["plan", *options, *flags])
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        return json.loads(result.read_text())


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    sent = {
        link: sum(i["moved"] * i["count"] for i in record["collectives"] if i["crosses_slices"] == (link == "DCN"))
        for link in ("ICI", "DCN")
    }
    found = record["prediction"]
    times = {
        name: found[name] for name in ("products", "memory", "exposed_ici", "exposed_dcn", "hidden", "step_seconds")
    }
    topology, memory = record["topology"], record["memory_bytes"]
    return {"topology": topology, "memory_bytes": memory, "sent_bytes": sent, **times, "mfu": found["mfu"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", required=True, help="path without ending")
    parser.add_argument("--rows", type=int, default=4, help="texts on each chip")
    parser.add_argument("options", nargs="*", help="after --: options of `transformer plan`; default: a small model")
    given = parser.parse_args()
    options = given.options or list(MODEL)
    rows = []
    for topology, slices in POINTS:
        rows.append(row_of(plan(topology, slices, given.rows, options)))
        print(json.dumps(rows[-1]), flush=True)
    command = f"python benchmarks/pod_scaling.py --output DATE-pod-scaling --rows {given.rows} -- {' '.join(options)}"
    record = {"command": command, "machine": machine(), "points": rows}
    Path(f"{given.output}.json").write_text(json.dumps(record, indent=1) + "\n")
    chips = [row["topology"]["chips"] for row in rows]

    def draw(figure: Any) -> None:
        left, right = figure.subplots(1, 2)
        for name in ("parameters", "optimizer_state", "temporaries", "total"):
            left.plot(
                chips, [row["memory_bytes"][name] / 1e6 for row in rows], marker="o", label=name.replace("_", " ")
            )
        left.set(title="memory of each chip, MB", xscale="log", yscale="log", xlabel="chips")
        for link in ("ICI", "DCN"):
            right.plot(chips, [row["sent_bytes"][link] / 1e6 for row in rows], marker="o", label=link)
        right.set(title="sent by each chip in a step, MB", xscale="log", yscale="symlog", xlabel="chips")
        for axes in (left, right):
            axes.set_xticks(chips, [f"{count:,}" for count in chips], minor=False)
            axes.legend()

    save_plot(draw, Path(f"{given.output}.png"))
    head = ("chips", "slices", "memory, MB", "ICI, MB", "DCN, MB", "step, ms", "MFU")
    cells = [
        (
            *(f"{row['topology'][name]:,}" for name in ("chips", "slices")),
            *(f"{size / 1e6:.4g}" for size in (row["memory_bytes"]["total"], *row["sent_bytes"].values())),
            f"{row['step_seconds'] * 1e3:.4g}",
            f"{row['mfu']:.1%}",
        )
        for row in rows
    ]
    print(table(head, cells))


if __name__ == "__main__":
    main()

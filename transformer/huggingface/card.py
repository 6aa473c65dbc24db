"""The model card of an exported run: what was trained, for how long, and how well it did."""

import json
from collections.abc import Mapping
from typing import Any

from transformer.checkpointing.run import Run
from transformer.config import ModelConfig, to_json


def model_card(run: Run, model: ModelConfig, step: int, theirs: Mapping[str, Any], dtype: str, notes: list[str]) -> str:
    """Returns README.md, with the metadata that the hub reads at its head; `theirs` is the folder's config.json."""
    last = last_metrics(run, step)
    [architecture], kind = theirs["architectures"], theirs["model_type"]
    rows = {
        "steps": f"{step:,}",
        "architecture": f"{architecture} ({kind}), {model.num_layers} layers of width {model.width}",
        "parameters' type": dtype,
        "vocabulary": f"{model.vocab_size:,}",
        "objective": run.config.objective.name,
        "data": ", ".join(run.config.data.path or run.config.data.source),
        "seed": f"{run.config.seed}",
    }
    rows |= {name: f"{value:,}" if isinstance(value, int) else f"{value:.4f}" for name, value in last.items()}
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    told = "".join(f"\n{note}\n" for note in notes)
    return f"""---
library_name: transformers
tags:
- {kind}
---

# {run.workdir.name}

Trained with `transformer`, and exported to the layout of Hugging Face.
{told}
| | |
|---|---|
{table}

The whole configuration of the run:

```json
{to_json(run.config)}```
"""


def last_metrics(run: Run, step: int) -> dict[str, Any]:
    """Returns what metrics.jsonl says of tokens and losses at the last of its steps up to `step`."""
    path = run.workdir / "metrics.jsonl"
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        record = json.loads(line)
        if record["step"] <= step:
            loss = f"{record['split']} loss, nats"
            if record["split"] == "train":
                found["tokens read"] = found.get("tokens read", 0) + record["tokens"]
            found[loss] = float(record["loss"])
    return found

"""Times our training step against nanodo's own (github.com/google-deepmind/nanodo), interleaved in one sitting.

    python benchmarks/nanodo_step.py --nanodo CHECKOUT --nanodo-python VENV/bin/python

Each system runs in a process of its own with its own packages; nanodo's takes what its pyproject.toml names. This
process lets them step in turn, so that a change in the machine's load strikes all alike, and writes medians,
quartiles and the ratio of each round to benchmarks/results/. The shapes are the same: a decoder of 4 layers, width
256, 4 heads, MLP 1,024, learned positions, no biases, tied embeddings, 256 tokens; context 256, batch 16; float32 on
the CPU; AdamW. Both take the batch from NumPy in the timed step and end it when the new state is there.
nanodo's statistics of every tensor (`log_internal_metrics`) are off: they would slow it down.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, VOCABULARY = 4, 256, 4, 256, 16, 256
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_ARENA_MAX": "1"}
"""glibc's allocator keeps freed memory: what transformer.parallel.startup does for our own process."""

Step = Callable[[Any], float]
"""From a batch of token ids to the loss, once the new state is there."""


def our_step() -> Step:
    """Returns our step as `train.py` builds it: configuration, mesh, shardings, donated state."""
    sys.path.insert(0, str(ROOT))
    from transformer.config import Config, replace

    config = replace(
        Config(),
        data={"sequence_length": CONTEXT, "tokenizer_vocab_size": VOCABULARY},
        model={
            "vocab_size": VOCABULARY,
            "num_layers": LAYERS,
            "width": WIDTH,
            "num_heads": HEADS,
            "num_positions": CONTEXT,
            "positions": "learned",
        },
        train={"batch_size": BATCH},
        compilation_cache_dir="",
    )
    from transformer.parallel import startup

    startup.start(config)

    import jax
    import numpy as np

    from transformer.checkpointing.run import for_platform, resolve
    from transformer.models.parameters import parameter_specs
    from transformer.models.transformer import Transformer
    from transformer.optimizers import make_optimizer
    from transformer.parallel.sharding import batch_sharding, make_mesh, replicated
    from transformer.training.state import create_state, state_shardings
    from transformer.training.step import make_train_step

    mesh = make_mesh(config)
    config = resolve(config, VOCABULARY)
    model = Transformer(for_platform(config.model, jax.default_backend()))
    optimizer = make_optimizer(config, parameter_specs(model))
    shardings = state_shardings(model, optimizer, mesh)
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh):
        state = create_state(config, model, optimizer, shardings)
        compiled = jax.jit(
            make_train_step(config, model, optimizer, shardings),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        )

    def step(ids: Any) -> float:
        nonlocal state
        targets = np.roll(ids, -1, axis=1)
        weights = np.ones(ids.shape, np.float32)
        weights[:, -1] = 0  # nanodo too has no target for the last token
        positions = np.broadcast_to(np.arange(CONTEXT, dtype=np.int32), ids.shape)
        batch = {
            "inputs": ids,
            "targets": targets,
            "weights": weights,
            "positions": positions,
            "segment_ids": np.ones_like(ids),
        }
        with jax.set_mesh(mesh):
            state, metrics = compiled(state, jax.device_put(batch, rows))
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])

    return step


def nanodo_step(checkout: str) -> Step:
    """Returns nanodo's step as its `train_and_evaluate` builds it: model, state and Trainer from its own modules."""
    sys.path.insert(0, checkout)
    train = importlib.import_module("nanodo.train")
    model_factory = importlib.import_module("nanodo.model_factory")
    config = importlib.import_module("nanodo.configs.default").get_config()
    config.batch_size = BATCH
    config.log_internal_metrics = False
    config.model.update({"D": WIDTH, "H": HEADS, "L": CONTEXT, "N": LAYERS, "F": 4 * WIDTH, "dtype": "float32"})

    import jax

    mesh = train.Mesh(train.mesh_utils.create_device_mesh((jax.device_count(),)), ("data",))
    model, get_loss = model_factory.get_model_and_loss(config, VOCABULARY)
    shardings, state = train._init_train_state(config, model, rng=jax.random.PRNGKey(0), mesh=mesh)
    trainer = train.Trainer(c=config, state=state, mesh=mesh, shardings=shardings, get_loss_fn=get_loss)

    def step(ids: Any) -> float:
        metrics = trainer.do_step(1, ids)
        jax.block_until_ready((trainer.state, metrics))
        return float(metrics["train_loss"])

    return step


def work(system: str, checkout: str) -> None:
    """Answers each number of steps on standard input with a line of JSON: the seconds each took, and the last loss."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    step = our_step() if system == "transformer" else nanodo_step(checkout)

    import numpy as np

    # Ids from 1: nanodo takes 0 for padding.
    random = np.random.default_rng(0)
    hello = {name: importlib.metadata.version(name) for name in PACKAGES}
    print(json.dumps(hello | {"python": platform.python_version()}), file=answers, flush=True)
    for line in sys.stdin:
        seconds, loss = [], math.nan
        for _ in range(int(line)):
            ids = random.integers(1, VOCABULARY, (BATCH, CONTEXT), dtype=np.int32)
            start = time.perf_counter()
            loss = step(ids)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "loss": loss}), file=answers, flush=True)


@dataclass
class Arm:
    """One system under measurement: a process that steps when it is told to."""

    name: str
    process: subprocess.Popen[str]
    versions: dict[str, str]
    seconds: list[list[float]]
    """For each round, what each step took."""

    @classmethod
    def start(cls, name: str, python: str, checkout: str, environment: dict[str, str]) -> "Arm":
        system = name.partition(",")[0]
        process = subprocess.Popen(
            [python, __file__, "--worker", system, "--nanodo", checkout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        )
        arm = cls(name, process, {}, [])
        arm.versions = arm.answer()
        return arm

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self, num_steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(num_steps, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


@dataclass(frozen=True)
class Spread:
    first_quartile: float
    median: float
    third_quartile: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.first_quartile:.3f} to {self.third_quartile:.3f})"


def hardware() -> dict[str, Any]:
    names = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }


def _lines(path: str) -> Iterator[str]:
    if Path(path).exists():
        yield from Path(path).read_text().splitlines()


def measure(arms: list[Arm], num_rounds: int, num_steps: int, num_warmup_steps: int) -> None:
    losses = [arm.run(num_warmup_steps)["loss"] for arm in arms]
    for arm, loss in zip(arms, losses, strict=True):
        # Random ids cannot be learned: each system must sit near log V, or it does other work than it says.
        assert abs(loss - math.log(VOCABULARY)) < 0.5, f"{arm.name}: loss {loss} on random ids"
    for number in range(num_rounds):
        # Each round begins with another system, so that none is always the one after a pause.
        first = number % len(arms)
        for arm in arms[first:] + arms[:first]:
            arm.seconds.append(arm.run(num_steps)["seconds"])
        print(f"round {number + 1}: " + ", ".join(f"{a.name} {statistics.median(a.seconds[-1]):.3f} s" for a in arms))


def report(arms: list[Arm], machine: dict[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """Returns the result as JSON and as Markdown; ratios are to the first arm's, round by round."""
    ours = [statistics.median(block) for block in arms[0].seconds]
    rows = []
    for arm in arms:
        medians = [statistics.median(block) for block in arm.seconds]
        rows.append(
            {
                "system": arm.name,
                "step_seconds": asdict(Spread.of([second for block in arm.seconds for second in block])),
                "ours_relative": asdict(Spread.of([a / b for a, b in zip(ours, medians, strict=True)])),
                "versions": arm.versions,
                "seconds": arm.seconds,
            }
        )
    date = datetime.date.today().isoformat()
    shapes = {
        "layers": LAYERS,
        "width": WIDTH,
        "heads": HEADS,
        "context": CONTEXT,
        "batch": BATCH,
        "vocabulary": VOCABULARY,
        "dtype": "float32",
    }
    result = {"date": date, "command": command, "hardware": machine, "shapes": shapes, "systems": rows}
    table = "\n".join(
        f"| {row['system']} | {Spread(**row['step_seconds'])} | {Spread(**row['ours_relative'])} |" for row in rows
    )
    versions = "\n".join(f"- {arm.name}: " + ", ".join(f"{k} {v}" for k, v in arm.versions.items()) for arm in arms)
    blocks = f"{len(arms[0].seconds)} rounds of {len(arms[0].seconds[0])} steps"
    text = f"""# Training step against nanodo, {date}

{LAYERS} layers, width {WIDTH}, {HEADS} heads, context {CONTEXT}, batch {BATCH}, vocabulary {VOCABULARY}, float32, AdamW;
{machine["processor"]}, {machine["cores"]} cores, load {machine["load_at_start"]} at the start; {blocks} in turn, one process a system.
Median (quartiles).

| system | seconds a step | our step / its step, by round |
|---|---|---|
{table}

{versions}

"nanodo, kept memory" is nanodo with glibc told to keep freed memory, as our start-up does: it has no such setting itself.

    {command}
"""
    return result, text


def main() -> None:
    parser = argparse.ArgumentParser(description="Times our training step against nanodo's, interleaved.")
    parser.add_argument("--nanodo", required=True, help="checkout of google-deepmind/nanodo")
    parser.add_argument("--nanodo-python", default=sys.executable, help="Python that has nanodo's requirements")
    parser.add_argument("--num-rounds", type=int, default=12)
    parser.add_argument("--num-steps", type=int, default=8, help="steps of each system in a round")
    parser.add_argument("--num-warmup-steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=("transformer", "nanodo"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.nanodo)
    machine = hardware()
    arms = [
        Arm.start("transformer", sys.executable, options.nanodo, {}),
        Arm.start("nanodo", options.nanodo_python, options.nanodo, {}),
        Arm.start("nanodo, kept memory", options.nanodo_python, options.nanodo, KEPT_MEMORY),
    ]
    measure(arms, options.num_rounds, options.num_steps, options.num_warmup_steps)
    for arm in arms:
        arm.stop()
    command = (
        "python benchmarks/nanodo_step.py --nanodo CHECKOUT --nanodo-python PYTHON"
        f" --num-rounds {options.num_rounds} --num-steps {options.num_steps}"
    )
    result, text = report(arms, machine, command)
    stem = f"{result['date']}-nanodo-step"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()

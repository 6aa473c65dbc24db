"""Times our training step against those of other code bases, each from its own checkout, interleaved in one sitting.

    python benchmarks/peers.py S --peer nanogpt=../nanoGPT,PYTHON --peer nanodo=../nanodo,PYTHON --peer lm1b=../flax,PYTHON
    python benchmarks/peers.py M --peer nanogpt=../nanoGPT,PYTHON
    python benchmarks/peers.py 1B --peer nanogpt=../nanoGPT,PYTHON    # on a GPU, as `shakespeare_char`

A peer is its name, its checkout and a Python that has its requirements. Every system steps in a process of its own, when this
one tells it to, in turn, so that a change in the machine's load strikes all alike. Ours is what `transformer benchmark step`
runs with the options that are printed. All train a decoder of the same shape with AdamW, on ids that are drawn evenly, in
float32 on the CPU, or in bfloat16 on a GPU, where nanoGPT is compiled and uses its fused AdamW and flash attention. Medians,
quartiles and the ratio of each round go to benchmarks/results/, and with them, on the CPU, what kinds of operations a step's time
goes to, from a trace of a few steps after the measurement, summed over threads. Peers' Pythons have nothing of ours.

- `nanogpt` (github.com/karpathy/nanoGPT): its GPT and optimizer in PyTorch, eager, as its train.py steps. With dropout it
  drops attention weights too, which we do not.
- `nanodo` (github.com/google-deepmind/nanodo): its model, state and Trainer; its statistics of every tensor are off.
- `lm1b` (github.com/google/flax, examples/lm1b): its model, state and train_step, without dropout.

The last two import TensorFlow for data and logs: a stand-in takes its place, so their Python needs only jax, flax, optax,
grain, ml-collections and absl-py.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "20000000000", "MALLOC_ARENA_MAX": "1"}
"""glibc's allocator keeps freed memory: what transformer.parallel.startup does for our own process."""

TRACED_STEPS, SLOWEST = 3, 12

FACTS: dict[str, Any] = {}
"""What our own step knows of itself."""

Step = Callable[[Any], float]
"""From a batch of token ids to the loss, once the new state is there."""


@dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    heads: int
    context: int
    batch: int
    vocabulary: int
    options: str
    """What gives our step this shape."""
    dropout: float = 0.0
    gpu: bool = False


SHAPES = {
    "S": Shape(
        4, 256, 4, 256, 16, 256,
        "--config shakespeare_char --model.num-layers 4 --model.num-heads 4 --model.width 256 --model.vocab-size 256"
        " --model.positions learned --model.dropout 0 --train.batch-size 16",
    ),
    "M": Shape(
        12, 768, 12, 1024, 1, 50_304,
        "--config gpt2_124m --model.vocab-size 50304 --model.no-biases --model.compute-dtype float32"
        " --train.batch-size 1 --train.num-microbatches 1",
    ),
    "1B": Shape(
        18, 2048, 16, 2048, 4, 50_304,
        "--config gpt2_124m --model.num-layers 18 --model.width 2048 --model.num-heads 16 --model.vocab-size 50304"
        " --model.no-biases --data.sequence-length 2048 --train.batch-size 4 --train.num-microbatches 1",
        gpu=True,
    ),
    "shakespeare_char": Shape(
        6, 384, 6, 256, 64, 65,
        "--config shakespeare_char --model.vocab-size 65 --model.positions learned --model.compute-dtype bfloat16",
        dropout=0.2,
        gpu=True,
    ),
}  # fmt: skip


def our_step(shape: Shape, checkout: str) -> Step:
    from transformer.arguments import parse
    from transformer.benchmarks.step import Options
    from transformer.parallel import startup

    config = parse(Options, shape.options.split(), "benchmark step").config
    startup.start(config)

    import jax

    from transformer.benchmarks.program import make_program

    assert jax.default_backend() == ("gpu" if shape.gpu else "cpu"), "JAX sees other devices than the shape is for"
    program = make_program(config)
    found = program.config.model
    assert (found.num_layers, found.width, found.num_heads) == (shape.layers, shape.width, shape.heads)
    assert program.batch["inputs"].shape == (shape.batch, shape.context) and found.vocab_size == shape.vocabulary

    def step(ids: Any) -> float:
        targets = ids[:, [*range(1, shape.context), 0]]
        program.batch |= jax.device_put({"inputs": ids, "targets": targets}, program.batch["inputs"].sharding)
        metrics = program()
        jax.block_until_ready((program.state, metrics))
        return float(metrics["loss"])

    facts = {f"flops, attention {name}": program.flops(name == "causal half") for name in ("in full", "causal half")}
    FACTS.update(facts | {"peak": program.peak_flops, "device": program.mesh.devices.flat[0].device_kind})
    return step


def nanogpt_step(shape: Shape, checkout: str) -> Step:
    sys.path.insert(0, checkout)
    model = importlib.import_module("model")
    torch = importlib.import_module("torch")
    torch.manual_seed(1337)
    sizes = (shape.context, shape.vocabulary, shape.layers, shape.heads, shape.width)
    device = "cuda" if shape.gpu else "cpu"
    gpt = model.GPT(model.GPTConfig(*sizes, dropout=shape.dropout, bias=False)).to(device)
    optimizer = gpt.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device)
    # As its train.py does.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    half = torch.autocast(device, torch.bfloat16, enabled=shape.gpu)
    gpt = torch.compile(gpt) if shape.gpu else gpt

    def step(ids: Any) -> float:
        inputs = torch.from_numpy(ids).to(device).long()
        with half:
            _, loss = gpt(inputs, torch.roll(inputs, -1, 1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def _stand_in(*modules: str) -> None:
    """Makes modules for data and logs importable that need TensorFlow: no step has to do with them."""
    from unittest.mock import MagicMock

    for name in ("clu", "clu.metric_writers", "clu.periodic_actions", *modules):
        sys.modules[name] = MagicMock()


def nanodo_step(shape: Shape, checkout: str) -> Step:
    _stand_in()
    sys.path.insert(0, checkout)
    train = importlib.import_module("nanodo.train")
    model_factory = importlib.import_module("nanodo.model_factory")
    config = importlib.import_module("nanodo.configs.default").get_config()
    config.batch_size = shape.batch
    config.log_internal_metrics = False
    sizes = {"D": shape.width, "H": shape.heads, "L": shape.context, "N": shape.layers, "F": 4 * shape.width}
    config.model.update({**sizes, "dtype": "float32"})

    import jax

    mesh = train.Mesh(train.mesh_utils.create_device_mesh((jax.device_count(),)), ("data",))
    model, get_loss = model_factory.get_model_and_loss(config, shape.vocabulary)
    shardings, state = train._init_train_state(config, model, rng=jax.random.PRNGKey(0), mesh=mesh)
    trainer = train.Trainer(c=config, state=state, mesh=mesh, shardings=shardings, get_loss_fn=get_loss)

    def step(ids: Any) -> float:
        metrics = trainer.do_step(1, ids)
        jax.block_until_ready((trainer.state, metrics))
        return float(metrics["train_loss"])

    return step


def lm1b_step(shape: Shape, checkout: str) -> Step:
    importlib.import_module("flax.training.checkpoints")  # which looks for TensorFlow's files
    _stand_in("tensorflow", "input_pipeline", "temperature_sampler")
    sys.path.insert(0, str(Path(checkout) / "examples" / "lm1b"))
    train, models, utils = (importlib.import_module(name) for name in ("train", "models", "utils"))
    config = importlib.import_module("configs.default").get_config()
    config.per_device_batch_size, config.max_target_length = shape.batch, shape.context

    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sizes = {"emb_dim": shape.width, "qkv_dim": shape.width, "mlp_dim": 4 * shape.width, "num_heads": shape.heads}
    model_config = models.TransformerConfig(
        vocab_size=shape.vocabulary,
        output_vocab_size=shape.vocabulary,
        dtype=jnp.float32,
        num_layers=shape.layers,
        max_len=shape.context,
        dropout_rate=0.0,
        attention_dropout_rate=0.0,
        **sizes,
    )
    mesh = Mesh(utils.create_device_mesh(config), config.mesh_axes)
    rate = train.create_learning_rate_schedule(config.learning_rate, config.warmup_steps)
    optimizer = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-9, weight_decay=config.weight_decay)
    model = models.TransformerLM(model_config.replace(deterministic=True))
    key = jax.random.PRNGKey(0)
    state, layout = utils.setup_initial_state(model, optimizer, config, key, mesh)
    rows = NamedSharding(mesh, PartitionSpec(config.data_sharding))
    compiled = jax.jit(
        train.train_step,
        in_shardings=(layout, rows, None),
        out_shardings=(layout, None),
        static_argnums=(2, 3, 4),
        donate_argnums=0,
    )

    def step(ids: Any) -> float:
        nonlocal state
        with mesh:
            state, metrics = compiled(state, {"inputs": ids}, model_config, rate, 0.0, key)
        jax.block_until_ready((state, metrics))
        return float(np.asarray(metrics["loss"]) / np.asarray(metrics["denominator"]))

    return step


def profile_jax(step: Step, draw: Callable[[], Any]) -> Counter[str]:
    """Returns the milliseconds of a step by kind of operation, summed over threads."""
    import tempfile

    import jax
    from jax.profiler import ProfileData

    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(TRACED_STEPS):
                step(draw())
        (path,) = Path(directory).rglob("*.xplane.pb")
        for plane in ProfileData.from_file(str(path)).planes:
            for event in (event for line in plane.lines for event in line.events):
                operation = str(dict(event.stats).get("hlo_op", ""))
                kind = re.sub(r"[._]?\d+|\.clone|\.remat", "", operation)
                total[kind] += event.duration_ns / 1e6 / TRACED_STEPS if operation else 0
    return total


def profile_torch(step: Step, draw: Callable[[], Any]) -> Counter[str]:
    """Returns the milliseconds of a step by PyTorch's operators, each without those that it calls."""
    from torch.profiler import ProfilerActivity, profile  # pyright: ignore[reportMissingImports]

    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(TRACED_STEPS):
            step(draw())
    return Counter({row.key: row.self_cpu_time_total / 1e3 / TRACED_STEPS for row in found.key_averages()})


SYSTEMS = {"transformer": our_step, "nanogpt": nanogpt_step, "nanodo": nanodo_step, "lm1b": lm1b_step}


def work(system: str, shape: Shape, checkout: str) -> None:
    """Answers each number of steps on standard input with a line of JSON: the seconds each took, and the last loss."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is not an answer
    if system != "transformer":
        sys.path.remove(str(ROOT))  # other code bases have packages of the same names
    step = SYSTEMS[system](shape, checkout)

    import numpy as np

    # Ids from 1: nanodo and lm1b take 0 for padding.
    random = np.random.default_rng(0)
    hello = {name: _version(name) for name in PACKAGES if name.partition(".")[0] in sys.modules}
    hello |= {"python": platform.python_version()}
    print(json.dumps({"versions": hello, "facts": FACTS}), file=answers, flush=True)

    def draw() -> Any:
        return random.integers(1, shape.vocabulary, (shape.batch, shape.context), dtype=np.int32)

    for line in sys.stdin:
        if line == "profile\n":
            found = (profile_jax if "jax" in sys.modules else profile_torch)(step, draw)
            print(json.dumps(dict(found.most_common(SLOWEST))), file=answers, flush=True)
            continue
        seconds, loss = [], math.nan
        for _ in range(int(line)):
            ids = draw()
            start = time.perf_counter()
            loss = step(ids)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds, "loss": loss}), file=answers, flush=True)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


@dataclass
class Arm:
    """One system under measurement: a process that steps when it is told to."""

    name: str
    process: subprocess.Popen[str]
    revision: str
    versions: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[list[float]] = field(default_factory=list)
    """For each round, what each step took."""
    operations: dict[str, float] = field(default_factory=dict)
    """The milliseconds of a step by kind of operation."""

    @classmethod
    def start(cls, system: str, shape: str, checkout: str, python: str, environment: dict[str, str]) -> "Arm":
        # Several processes share a GPU: XLA may not take most of its memory at the start.
        place = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} if SHAPES[shape].gpu else {"JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(
            [python, __file__, shape, "--worker", system, "--checkout", checkout],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **place, **environment},
        )
        done = subprocess.run(
            ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
        arm = cls(system + (", kept memory" if environment else ""), process, done.stdout.strip())
        hello = arm.answer()
        arm.versions, arm.facts = hello["versions"], hello["facts"]
        return arm

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self, num_steps: int | Literal["profile"]) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(num_steps, file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def measure(arms: list[Arm], shape: Shape, num_rounds: int, num_steps: int, num_warmup_steps: int) -> None:
    expected = math.log(shape.vocabulary)
    for arm in arms:
        loss = arm.run(1)["loss"]
        # Ids drawn evenly cannot be learned: each system must sit near log V, or it does other work than it says.
        assert abs(loss - expected) < 1, f"{arm.name}: loss {loss} on random ids, expected {expected}"
        arm.run(num_warmup_steps)
    for number in range(num_rounds):
        # Each round begins with another system, so that none is always the one after a pause.
        first = number % len(arms)
        for arm in arms[first:] + arms[:first]:
            arm.seconds.append(arm.run(num_steps)["seconds"])
        print(f"round {number + 1}: " + ", ".join(f"{a.name} {statistics.median(a.seconds[-1]):.3f} s" for a in arms))


def report(arms: list[Arm], name: str, machine: dict[str, Any], command: str) -> tuple[dict[str, Any], str]:
    """Returns the result as JSON and as Markdown; ratios are of our step to the arm's, round by round."""
    from transformer.benchmarks.measure import Measurement
    from transformer.benchmarks.report import table

    def spread(values: Sequence[float]) -> str:
        found = Measurement(tuple(values), "")
        return f"{found.median:.3f} ({found.quartiles[0]:.3f} to {found.quartiles[1]:.3f})"

    shape = SHAPES[name]
    ours = [statistics.median(block) for block in arms[0].seconds]
    systems, rows = [], []
    costs = {name: cost for name, cost in arms[0].facts.items() if name.startswith("flops")}
    peak = arms[0].facts["peak"]
    header = ["system", "seconds a step", "our step / its step, by round"]
    header += [name.replace("flops", "MFU") for name in costs] if peak else []
    for arm in arms:
        ratios = [a / statistics.median(block) for a, block in zip(ours, arm.seconds, strict=True)]
        systems.append(
            {
                "system": arm.name,
                "revision": arm.revision,
                "versions": arm.versions,
                "ours_relative": ratios,
                "seconds": arm.seconds,
                "milliseconds_by_operation": arm.operations,
            }
        )
        seconds = [second for block in arm.seconds for second in block]
        rows.append([arm.name, spread(seconds), spread(ratios)])
        rows[-1] += [f"{flops / statistics.median(seconds) / peak:.1%}" for flops in costs.values()] if peak else []
    date = datetime.date.today().isoformat()
    result = {"date": date, "command": command, "hardware": machine, "shape": asdict(shape)}
    result |= {"facts": arms[0].facts, "systems": systems}
    versions = "\n".join(
        f"- {arm.name} at {arm.revision}: " + ", ".join(f"{k} {v}" for k, v in arm.versions.items()) for arm in arms
    )
    kinds = {arm.name: ", ".join(f"{kind} {ms:.0f}" for kind, ms in arm.operations.items()) for arm in arms}
    lines = "\n".join(f"- {arm}: {found}" for arm, found in kinds.items() if found)
    operations = f"\nMilliseconds of a step by kind of operation, of a trace:\n\n{lines}\n" if lines else ""
    if any("kept memory" in arm.name for arm in arms):
        operations += """
"Kept memory" is a peer whose glibc is told to keep freed memory, as our start-up does: it has no such setting itself.
"""
    text = f"""# Training step against others, shape {name}, {date}

{shape.layers} layers, width {shape.width}, {shape.heads} heads, context {shape.context}, batch {shape.batch}, vocabulary \
{shape.vocabulary:,}, {"bfloat16" if shape.gpu else "float32"}, AdamW; {arms[0].facts["device"]}, {machine["processor"]}, \
{machine["cores"]} cores, load {machine["load_at_start"]} at
the start; {len(arms[0].seconds)} rounds of {len(arms[0].seconds[0])} steps in turn, one process a system. Median (quartiles).

{table(header, rows)}
{versions}
{operations}
Ours is `transformer benchmark step {shape.options}`.

    {command}
"""
    return result, text


def main() -> None:
    parser = argparse.ArgumentParser(description="Times our training step against others', interleaved.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=CHECKOUT,PYTHON")
    parser.add_argument(
        "--kept-memory", action="store_true", help="each peer also with the allocator's setting of ours"
    )
    parser.add_argument("--num-rounds", type=int, default=12)
    parser.add_argument("--num-steps", type=int, default=8, help="steps of each system in a round")
    parser.add_argument("--num-warmup-steps", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    parser.add_argument("--checkout", default=str(ROOT), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, SHAPES[options.shape], options.checkout)
    peers = []
    for peer in options.peer:
        name, _, rest = peer.partition("=")
        checkout, _, python = rest.partition(",")
        if name not in SYSTEMS or name == "transformer" or not Path(checkout).is_dir():
            parser.error(f"--peer {peer}: must be NAME=CHECKOUT,PYTHON with a name of nanogpt, nanodo, lm1b")
        peers.append((name, str(Path(checkout).resolve()), python or sys.executable))
    machine = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
    arms = [Arm.start("transformer", options.shape, str(ROOT), sys.executable, {})]
    for environment in [{}, KEPT_MEMORY] if options.kept_memory else [{}]:
        arms += [Arm.start(name, options.shape, checkout, python, environment) for name, checkout, python in peers]
    measure(arms, SHAPES[options.shape], options.num_rounds, options.num_steps, options.num_warmup_steps)
    for arm in arms:
        arm.operations = {} if SHAPES[options.shape].gpu else arm.run("profile")
        arm.stop()
    flags = "".join(f" --peer {name}=CHECKOUT,PYTHON" for name, _, _ in peers)
    flags += " --kept-memory" if options.kept_memory else ""
    command = f"python benchmarks/peers.py {options.shape}{flags}"
    command += f" --num-rounds {options.num_rounds} --num-steps {options.num_steps}"
    result, text = report(arms, options.shape, machine, command)
    stem = f"{result['date']}-peers-{options.shape}-jax{arms[0].versions['jax']}"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(text)
    print(text)


def _processor() -> str:
    from transformer.benchmarks.measure import processor

    return processor()


if __name__ == "__main__":
    main()

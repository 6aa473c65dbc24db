"""`transformer benchmark rnn`: recurrent networks, mixers with a state and attention, by the length of the text.

At equal parameters and tokens a step a longer text costs attention more work, and a recurrent network more waiting: its products
form a chain as long as the text. What that makes of the time depends on how much the hardware does at once.
"""

import dataclasses
import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from transformer.arguments import Overrides, Recipe
from transformer.benchmarks.measure import JsonFile, Measurement, Result, machine, own_process, timed, too_small
from transformer.benchmarks.report import save_plot
from transformer.benchmarks.rnn_report import DEVICES, SPLIT_LENGTH, Cell, draw, report
from transformer.config import Config, ConfigError, from_json, replace, to_json, write_atomically
from transformer.config.model import Mixer

if TYPE_CHECKING:
    from transformer.benchmarks import torch_lstm

PYTORCH = "lstm of PyTorch"


@dataclass(frozen=True)
class Options:
    """Train with each mixer on texts of each length, and report speed, memory, chains of products and what follows.

    The feed-forward part is as wide as makes the parameters equal. What needs more than --memory is compiled and not run.
    """

    RECIPE: ClassVar[str] = "parallelism"
    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory; none: `parallelism`."""
    lengths: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Tokens of a text."""
    mixers: tuple[str, ...] = ("attention", "lstm", "gru", "mingru", "linear_attention", "gated_delta_net", "mamba2")
    """What is compared."""
    tokens: int = 16384
    """Tokens of a step."""
    memory: float = 8.0
    """GiB that a step may need."""
    rounds: int = 3
    """Steps that are timed."""
    pytorch: str = ""
    """A Python that has PyTorch, whose LSTM is then timed as well, in a process of its own: on a GPU that is cuDNN's."""
    output: str = ""
    """Directory for result.json, report.md and plot.png; empty: the report is printed."""
    json_file: JsonFile = ""
    """File to write the result to."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problem := _problem(options):
        raise ConfigError(problem)
    from transformer.parallel import startup

    startup.start(options.config)
    # Before this process takes the device's memory.
    others = pytorch(options) if options.pytorch else {}
    from transformer.benchmarks.roofline import ceilings

    calls, work = ceilings(options.config.model.compute_dtype)
    products = {name: call for name, call in calls.items() if name != "memory"}
    fastest = {name: work[name] / min(seconds) for name, seconds in timed(products, options.rounds, 2).items()}
    cells = [cell for length in options.lengths for cell in measure(options, length)]
    for cell in [cell for cell in cells if cell.mixer == "lstm"] if others else []:
        run = others[cell.length]
        as_ours = {"seconds": run.seconds, "bytes": run.bytes, "parameters": run.parameters}
        cells.append(dataclasses.replace(cell, mixer=PYTORCH, **as_ours))
    facts = {"cells": [asdict(cell) for cell in cells], "ceiling": max(fastest.values()), "split": split(options)}
    subject = {"tokens": options.tokens, "model": json.loads(to_json(options.config))["model"]}
    seconds = {f"{c.mixer}, {c.length} tokens": Measurement(c.seconds, "s") for c in cells if c.seconds}
    result = Result("rnn", subject, machine(), seconds, facts)
    text = report(cells, facts["ceiling"], facts["split"], result.machine)
    print(text)
    if options.json_file:
        result.write(options.json_file)
    if options.output:
        directory = Path(options.output).expanduser()
        directory.mkdir(parents=True, exist_ok=True)
        result.write(str(directory / "result.json"))
        write_atomically(directory / "report.md", text)
        save_plot(lambda figure: draw(cells, facts["ceiling"], figure), directory / "plot.png")
    return 0


def _problem(options: Options) -> str | None:
    if problems := too_small(options, {"rounds": 1, "lengths": 1}):
        return problems[0]
    if not options.mixers or options.memory <= 0:
        return "--mixers needs at least one, and --memory more than 0"
    if unknown := [name for name in options.mixers if name not in get_args(Mixer)]:
        return f"--mixers = {unknown[0]!r}: must be of {', '.join(get_args(Mixer))}"
    if options.pytorch and "lstm" not in options.mixers:
        return "--pytorch: its LSTM is measured beside ours, which --mixers leaves out"
    if odd := [length for length in options.lengths if options.tokens % length or length > options.tokens]:
        return f"--tokens = {options.tokens}: must be a multiple of every length, which {odd[0]} does not divide"
    return None


def measure(options: Options, length: int) -> list[Cell]:
    """Compiles the step of every mixer for one length, and times in turn those that fit."""
    from transformer.benchmarks.products import longest_chain, work_of_products
    from transformer.benchmarks.program import make_program
    from transformer.models import flops

    programs, found = {}, {}
    for mixer in options.mixers:
        config = with_mixer(options.config, mixer, length, options.tokens // length)
        program = make_program(config)
        text = program.compiled.as_text()
        chain = text
        if mixer == "attention":
            # Implementations that go through the text in blocks make a chain of them to save memory; nothing demands it.
            defined = replace(config, model={"attention_implementation": "reference"})
            chain = make_program(defined).compiled.as_text()
        work = work_of_products(text)
        # cuDNN's attention is one call: two products forward and five back, of the causal half.
        scores = flops.forward_flops(program.config.model, length)["attention_scores_causal"]
        hidden = options.tokens // length * scores * 7 // 2 if "__cudnn$fmha" in text else 0
        peak = program.memory["peak"]
        print(f"compiled {mixer}, {length} tokens: {peak / 2**20:,.0f} MiB", file=sys.stderr, flush=True)
        cell = Cell(
            mixer, length, program.num_parameters, (), peak, work.flops + hidden, work.bytes, longest_chain(chain)
        )
        found[mixer] = cell
        if peak <= options.memory * 2**30:
            programs[mixer] = program
    seconds = timed(programs, options.rounds) if programs else {}
    return [dataclasses.replace(cell, seconds=tuple(seconds.get(mixer, ()))) for mixer, cell in found.items()]


def pytorch(options: Options) -> "dict[int, torch_lstm.Run]":
    """Returns what an LSTM of PyTorch's makes of each length, in the shape that ours has."""
    from transformer.benchmarks import torch_lstm
    from transformer.checkpointing.run import resolve
    from transformer.objectives import vocabulary

    def shape(length: int) -> torch_lstm.Shape:
        config = with_mixer(options.config, "lstm", length, options.tokens // length)
        return torch_lstm.Shape.of(resolve(config, vocabulary.without_data(config)))

    shapes = [shape(length) for length in options.lengths]
    return dict(zip(options.lengths, torch_lstm.measure(shapes, options.rounds, options.pytorch), strict=True))


def with_mixer(config: Config, mixer: str, length: int, rows: int) -> Config:
    """Returns the configuration with another mixer in every layer, texts of a length, and as many parameters."""
    from transformer.checkpointing.run import for_platform, resolve
    from transformer.models.parameters import num_parameters
    from transformer.models.transformer import Transformer
    from transformer.objectives import vocabulary

    config = replace(config, data={"sequence_length": length}, train={"batch_size": rows})

    def parameters(changed: Config) -> int:
        model = resolve(changed, vocabulary.without_data(changed)).model
        # As many on every platform; asking for this one would take its memory.
        return num_parameters(Transformer(for_platform(model, "cpu")))

    wanted = parameters(config)
    changed = replace(config, model={"layers": mixer, "state_width": None})
    # The number of parameters is linear in the width of the feed-forward part.
    narrow, wide = (parameters(replace(changed, model={"feedforward_width": 8 * n})) for n in (1, 2))
    width = 8 * max(1, 1 + round((wanted - narrow) / (wide - narrow)))
    return replace(changed, model={"feedforward_width": width})


def split(options: Options) -> dict[str, float]:
    """Returns how many of eight simulated devices work on products at once when each has an eighth of one text."""
    config = replace(options.config, parallel={"cpu_devices": DEVICES})
    settings = {"config": to_json(config), "mixers": options.mixers}
    command, environment = own_process("from transformer.benchmarks.rnn import child; child()")
    done = subprocess.run(command, env=environment, input=json.dumps(settings), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"the process with {DEVICES} devices ended with status {done.returncode}: {done.stderr[-2000:]}"
        )
    return json.loads(done.stdout)


def child() -> None:
    """The process with several devices: reads what to compile, and writes what each mixer's devices do."""
    from transformer.parallel import startup

    settings = json.load(sys.stdin)
    config = from_json(settings["config"])
    startup.start(config)
    print(json.dumps({mixer: devices_at_once(config, mixer) for mixer in settings["mixers"]}))


def devices_at_once(config: Config, mixer: str) -> float:
    """Returns the work of a layer's products over that of one device, of those among which one text is split.

    A device that has to do all of it, because it waits for what comes before its part, counts as none beside the others.
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from transformer.benchmarks.kernels import layer
    from transformer.benchmarks.products import work_of_products

    config = replace(config, model={"attention_implementation": "reference", "compute_dtype": "float32"})
    function, (params, x) = layer(config, mixer, 1, SPLIT_LENGTH)
    mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
    parts, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((None, "sequence"), ()))
    alone = jax.jit(function).lower(params, x).compile()
    together = jax.jit(function, in_shardings=(whole, parts), out_shardings=parts).lower(params, x).compile()
    return work_of_products(_text(alone)).flops / work_of_products(_text(together)).flops


def _text(compiled: Any) -> str:
    text = compiled.as_text()
    assert text is not None
    return text

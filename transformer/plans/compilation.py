"""The training step compiled ahead of time for a topology that is not here, and what the compiler says of it.

libtpu holds the whole compiler for TPUs and needs no TPU for it. What is compiled is what `train` runs: the same step, mesh
and flags.
"""

import importlib
import importlib.util
import math
import os
import re
import resource
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformer.benchmarks.hlo import Instruction, array_types, bits_and_dims, parse
from transformer.config import MESH_AXES, Config, ConfigError, mesh_axes, validate
from transformer.parallel import startup, xla_flags
from transformer.plans.chips import Chip, Topology
from transformer.plans.collectives import Collective, MeshShape, collectives_of, size_of

INSTALL = {
    "tpu": "compiling for a TPU needs libtpu, which needs no TPU: pip install -e '.[tpu]'",
    "gpu": "compiling for GPUs that are not here is not built in: --arithmetic plans for them without a compiler",
}


@dataclass(frozen=True)
class Memory:
    """Bytes on each chip."""

    parameters: int
    optimizer_state: int
    batch: int
    gradients: int = 0
    """Stacked by the backward loop over layers; with unrolled layers they are among the temporaries."""
    activations: int = 0
    """Kept by the forward loop for the backward one."""
    other: int = 0
    """All other temporaries: gathered parameters, logits, what a layer needs while it is computed."""
    largest: tuple[str, ...] = ()
    """What takes most of a program that the compiler refused, as it says."""

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer_state + self.batch

    @property
    def temporaries(self) -> int:
        return self.gradients + self.activations + self.other

    @property
    def total(self) -> int:
        return self.arguments + self.temporaries


@dataclass(frozen=True)
class Compiled:
    """What was found out about one configuration on one topology."""

    config: Config
    """Resolved: vocabulary and sizes of axes filled in."""
    topology: Topology
    axes: dict[str, int]
    memory: Memory
    fits: bool
    hbm_bytes: int
    """What the compiler lets a program have, where it said so, else what the chip has."""
    coordinates: list[tuple[int, ...]] = field(default_factory=list)
    """Of each device of the mesh, in its order: slice, then place on the torus."""
    collectives: list[Collective] = field(default_factory=list)
    """None of a program that the compiler refused."""
    compile_cpu_seconds: float = 0.0
    peak_host_bytes: int = 0


def prepare(chip: Chip, config: Config) -> None:
    """Settles what the compiler reads from the environment; call it before anything imports JAX.

    Raises ConfigError if the compiler is not installed.
    """
    if chip.platform != "tpu" or importlib.util.find_spec("libtpu") is None:
        raise ConfigError(INSTALL[chip.platform])
    # Only the compiler is wanted: neither a TPU, nor a search for one, nor its lock.
    os.environ["JAX_PLATFORMS"] = "cpu"
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", **quiet}.items():
        os.environ.setdefault(name, value)
    xla_flags.set_flags("tpu", os.environ, chip.name)
    startup.start(config)
    # It would else complain that it cannot find out in what machine it is.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")


def devices_of(topology: Topology) -> Sequence[Any]:
    """Returns descriptions of a topology's devices. Raises ConfigError if libtpu does not know it."""
    from jax.experimental import topologies

    slices: dict[str, Any] = {"num_slices": topology.num_slices} if topology.num_slices > 1 else {}
    if topology.num_chips // topology.num_slices < 4:
        slices["chips_per_host_bounds"] = (*topology.shape, 1)[:3]
    try:
        return topologies.get_topology_desc(topology_name=topology.name, platform="tpu", **slices).devices
    except Exception as error:  # JAX raises what the plugin says under several types
        raise ConfigError(f"--topology = {topology.name!r}: libtpu does not compile for it: {error}") from error


def compile_for(config: Config, topology: Topology, num_periods: int | None = None) -> Compiled:
    """Compiles the step of `config` for `topology`, with as many periods of layers as `num_periods` says, None: all.

    Raises ConfigError for what `train` would refuse there.
    """
    import jax

    from transformer.benchmarks.program import fewest_labels
    from transformer.checkpointing.run import for_platform, resolve
    from transformer.models.parameters import parameter_specs
    from transformer.models.transformer import Transformer
    from transformer.objectives import objective_of, vocabulary, with_window
    from transformer.optimizers import make_optimizer
    from transformer.parallel.sharding import batch_sharding, make_mesh, use_rules
    from transformer.training.state import abstract_state, state_shardings
    from transformer.training.step import compile_step, make_train_step

    config = at_depth(config, num_periods)
    validate(config, topology.num_chips, topology.chip.platform)
    devices = devices_of(topology)
    mesh = make_mesh(config, devices)
    labels = fewest_labels(config)
    config = resolve(with_window(config), vocabulary.without_data(config), labels)
    model = Transformer(for_platform(config.model, topology.chip.platform))
    optimizer = make_optimizer(config, parameter_specs(model))
    with use_rules(config):
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
    state, rows = abstract_state(model, optimizer, shardings), batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((config.train.batch_size, length), dtype, sharding=rows)
        for name, (length, dtype) in objective_of(config).arrays(config).items()
    }
    held: dict[str, Any] = {
        "parameters": bytes_on_device(state.params),
        "optimizer_state": bytes_on_device(state.opt_state),
        "batch": bytes_on_device(batch),
    }
    axes, limit = mesh_axes(config, topology.num_chips), topology.chip.hbm_bytes
    ordered = mesh.devices.flatten().tolist()
    places = [(getattr(d, "slice_index", None) or 0, *getattr(d, "coords", ())) for d in ordered]
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = before.ru_utime + before.ru_stime
    try:
        # What is compiled for hardware that is not here could not be read back from the cache of programs.
        with jax.set_mesh(mesh), use_rules(config), without_cache():
            step = make_train_step(config, model, optimizer, shardings)
            compiled = compile_step(step, state, batch, shardings, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        other = max(0, needed.used - (sum(held.values()) if needed.is_all else 0))
        memory = Memory(**held, other=other, largest=needed.largest)
        return Compiled(config, topology, axes, memory, False, needed.limit, places, [], *_spent(start))
    text = compiled.as_text()
    stacks = stacked_bytes(text, _stacks(state.params))
    found = compiled.memory_analysis()
    temporaries = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    known: dict[str, Any] = {name: min(size, temporaries) for name, size in stacks.items()}
    memory = Memory(**held, **known, other=max(0, temporaries - sum(known.values())))
    collectives = collectives_of(text, MeshShape(axes, [place[0] for place in places]))
    fits = memory.total <= limit
    return Compiled(config, topology, axes, memory, fits, limit, places, collectives, *_spent(start))


def _spent(start: float) -> tuple[float, int]:
    """Returns the processor's seconds since `start`, and the most memory that this process has had."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime - start, usage.ru_maxrss * 1024


def without_cache() -> Any:
    from jax._src.config import enable_compilation_cache

    return enable_compilation_cache(False)


def at_depth(config: Config, num_periods: int | None) -> Config:
    """Returns `config` with as many periods of its pattern of layers, in every stack."""
    if num_periods is None:
        return config
    from transformer.config import replace

    model = config.model
    depth = {"num_layers": len(model.first_kinds) + num_periods * len(model.kinds)}
    if model.architecture == "encoder_decoder":
        depth["num_encoder_layers"] = num_periods * len(model.encoder_kinds)
    return replace(config, model=depth)


def bytes_on_device(tree: Any) -> int:
    """Returns the bytes of a tree of shapes with layouts that lie on each device; what lies on the host does not count."""
    import jax

    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.sharding.memory_kind in (None, "device", "tpu_hbm")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _stacks(params: Any) -> Counter[tuple[int, ...]]:
    """Returns how many parameters there are of each shape on a device, of those that have one a layer."""
    import jax

    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    return Counter(shape for shape in shapes if len(shape) > 1)


def stacked_bytes(hlo: str, parameters: Mapping[tuple[int, ...], int]) -> dict[str, int]:
    """Returns the bytes of gradients and of activations that the backward loop over layers carries.

    An array of 32 bits with the shape of a parameter is its gradient; one of 16 bits is a copy of the parameter, and none
    of these; what else has the same number of layers is kept from the forward pass.
    """
    computations, entry = parse(hlo)
    depths = {shape[0] for shape in parameters}
    best: dict[str, int] = {}
    for loop in (i for i in _all(computations, entry) if i.opcode == "while"):
        found, left = {"gradients": 0, "activations": 0}, Counter(parameters)
        for kind in array_types(loop.type):
            _, dims = bits_and_dims(kind)
            if len(dims) < 2 or dims[0] not in depths or _ELSEWHERE.search(kind):
                continue
            if dims not in parameters:
                found["activations"] += size_of(kind)
            elif kind.startswith("f32") and left[dims] > 0:
                left[dims] -= 1
                found["gradients"] += size_of(kind)
        # XLA may have cut a turn off the loop, and with it what tells the backward one, which alone carries both.
        if found["gradients"] > best.get("gradients", 0):
            best = found
    return best


_ELSEWHERE = re.compile(r"S\([1-9]\)")
"""What stands in the layout of an array that is not in the chip's main memory."""


def _all(computations: Mapping[str, Sequence[Instruction]], entry: str) -> list[Instruction]:
    """Returns the instructions of the program and of the bodies of its loops."""
    found = list(computations[entry])
    for instruction in found:
        if instruction.opcode == "while" and (body := re.search(r"body=%?([\w.\-]+)", instruction.attributes)):
            found += computations[body.group(1)]
    return found


@dataclass(frozen=True)
class OutOfMemory:
    """What the compiler says of a program that is too large."""

    used: int
    limit: int
    is_all: bool
    """Whether `used` counts the arguments too, or the temporaries alone."""
    largest: tuple[str, ...] = ()


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def out_of_memory(message: str) -> OutOfMemory | None:
    """Returns what libtpu's message says that a program needs, None for any other message.

    Releases since 2026 tell the temporaries and the limit; those before told the whole and its largest arrays.
    """
    number = r"([\d.]+)([KMGT]?)"
    now = re.search(rf"required for ([^(]*)\({number}i?B?\) exceeds available HBM \({number}i?B?\)", message)
    before = re.search(rf"Used {number}i?B? of {number}i?B? hbm", message)
    found, first = (now, 2) if now else (before, 1)
    if found is None:
        return None
    used, limit = (round(float(found.group(n)) * _UNITS[found.group(n + 1)]) for n in (first, first + 2))
    largest = []
    for size, text in re.findall(r"Size: ([\d.]+[KMGT]?)\n(.*?)(?:={5}|$)", message, re.DOTALL):
        parts = (re.search(pattern, text) for pattern in (r"Shape: (\S+)", r'op_name="([^"]*)"'))
        largest.append(" ".join([f"{size}:", *(part.group(1) for part in parts if part)]))
    return OutOfMemory(used, limit, now is None or "argument" in now.group(1), tuple(largest))


def extrapolated(few: Compiled, more: Compiled, periods: tuple[int, int], config: Config) -> Compiled:
    """Returns what two depths say of the whole: every byte and every count that grows with the layers grows on evenly."""
    import dataclasses

    total = config.model.num_periods
    share = (total - periods[0]) / (periods[1] - periods[0])

    def beyond(one: int, two: int) -> int:
        return round(one + share * (two - one))

    names = [item.name for item in dataclasses.fields(Memory) if item.name != "largest"]
    bytes_of: dict[str, Any] = {name: beyond(getattr(few.memory, name), getattr(more.memory, name)) for name in names}
    memory = Memory(**bytes_of)
    grouped: dict[Any, list[int]] = {}
    samples: dict[Any, Collective] = {}
    for column, compiled in enumerate((few, more)):
        for item in compiled.collectives:
            key = (item.kind, item.axes, item.bytes, item.overlapped, item.source)
            samples[key] = item
            grouped.setdefault(key, [0, 0])[column] += item.count
    collectives = [
        dataclasses.replace(samples[key], count=count)
        for key, (one, two) in grouped.items()
        if (count := beyond(one, two)) > 0
    ]
    model = dataclasses.replace(
        few.config.model,
        num_layers=config.model.num_layers,
        num_encoder_layers=config.model.num_encoder_layers,
    )
    return dataclasses.replace(
        more,
        config=dataclasses.replace(few.config, model=model),
        memory=memory,
        fits=memory.total <= more.hbm_bytes,
        collectives=collectives,
        compile_cpu_seconds=few.compile_cpu_seconds + more.compile_cpu_seconds,
    )


def axes_text(axes: Mapping[str, int]) -> str:
    """Returns the split as a person writes it: the axes that split anything."""
    return " x ".join(f"{axis} {axes[axis]}" for axis in MESH_AXES if axes[axis] > 1) or "nothing split"

"""The command line: `transformer <verb>`; `VERBS` lists them."""

import dataclasses
import importlib
import json
import keyword
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformer.arguments import Json, Options, Overrides, Recipe, TrainOptions, Workdir, exit_status
from transformer.arguments import parse as parse_options
from transformer.benchmarks import BENCHMARKS
from transformer.benchmarks.measure import check_destination
from transformer.config import MESH_AXES, Config, ConfigError, mesh_problems, nearest, place, replace, source_length
from transformer.huggingface import command as huggingface
from transformer.huggingface.command import CompareOptions, ExportOptions, ImportOptions
from transformer.inference import command
from transformer.inference.command import GenerateOptions
from transformer.plans.command import PlanOptions
from transformer.studies import STUDIES


@dataclass(frozen=True)
class PrepareOptions:
    """Train or load the tokenizer and write the shards of tokens that training with this configuration reads."""

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    runner: str = ""
    """Have Apache Beam do the work (extra `beam`): direct, flink, spark or dataflow; empty: processes of this machine."""
    runner_options: tuple[str, ...] = ()
    """Options of Beam's runner: `name=value`, or `name` for a switch."""
    publish: str = ""
    """Copy tokenizer and shards to this directory, gs:// and s3:// too, from which `data.prepared` reads."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class EvaluateOptions:
    """Measure a run on the whole validation split."""

    workdir: Workdir = ""
    """The run directory."""
    step: int | None = None
    """Checkpoint to measure; None: the latest."""
    best: bool = False
    """Measure the checkpoint with the lowest validation loss."""
    average: int = 1
    """Measure the mean of the parameters of this many checkpoints, the last of them the one chosen."""
    baseline: bool = False
    """Measure an interpolated byte trigram, made from the same training text, beside it."""
    as_json: Json = False
    """Print one JSON object."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class ImplementationsOptions:
    """Show by what attention can be computed, what each implementation takes, and which of them take a configuration."""

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class DescribeOptions:
    """Show parameters by module, FLOPs a token, and sharding and bytes per device of every array; computes nothing."""

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    as_json: Json = False
    """Print one JSON object."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class StudyOptions:
    """Train the runs of a study that are not trained yet, and write down what came out: results.json, report.md, plot.png.

    A study that was stopped goes on where it was. Every key of the configuration changes all its runs.
    """

    study: str = ""
    """Name of the study."""
    recipe: Recipe = ""
    """A name in configs/, or the path of a recipe, that the study's runs change."""
    workdir: Workdir = ""
    """Where runs and results go."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds that each configuration is trained with."""
    only: tuple[str, ...] = ()
    """Names of the runs to make; none: all."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class BenchmarkOptions:
    """Measure one thing, named by the first word; each has options of its own."""

    config: Overrides = field(default_factory=Config)


def prepare(options: PrepareOptions) -> int:
    from transformer.data.prepared import prepare_apart
    from transformer.objectives import with_window

    if options.runner_options and not options.runner:
        raise ConfigError(f"--runner-options = {' '.join(options.runner_options)!r} needs --runner")
    config = with_window(options.config)
    if options.runner:
        # Loaded by name, for it is an extra's.
        beam = importlib.import_module("transformer.data.beam")
        prepared = beam.prepare(config, options.runner, options.runner_options)
    else:
        prepared = prepare_apart(config)
    print(f"tokenizer: {prepared.tokenizer.vocab_size:,} tokens")
    for source in prepared.sources:
        for split in (source.train, source.validation):
            documents = sum(shard.num_documents for shard in split.shards)
            sizes = f"{documents:,} documents, {split.num_bytes:,} bytes, {split.num_tokens:,} tokens"
            print(f"{source.name} {split.name}: {sizes}, {split.num_windows:,} examples in {split.directory}")
    if options.publish:
        importlib.import_module("transformer.data.published").publish(config, prepared, options.publish)
        print(f"published: --data.prepared {options.publish}")
    return 0


def train(options: TrainOptions) -> int:
    from transformer.parallel import startup

    startup.start(options.config)
    from transformer.training.loop import run

    return run(options.config, place(options.workdir))


def evaluate(options: EvaluateOptions) -> int:
    run, config, mesh = _open(options.workdir, options.config)

    import jax

    from transformer.checkpointing.loading import load_parameters
    from transformer.data.prepared import prepare_apart
    from transformer.objectives import objective_of, with_examples, with_window
    from transformer.parallel.sharding import use_rules
    from transformer.training.evaluation import Evaluator

    if options.baseline and not objective_of(config).COUNTS_TEXT:
        problem = f"objective.name = {config.objective.name!r} does not predict every byte of a text"
        raise ConfigError(f"--baseline: {problem}, which the trigram does")

    prepared = prepare_apart(with_window(config), show_progress=not options.as_json)
    if run.data_fingerprint not in ("", prepared.fingerprint):  # what was imported has no corpus
        raise ConfigError(f"the validation split is not that of the run: the corpus of {options.workdir} has changed")
    prepared = with_examples(prepared, objective_of(config), config)
    with jax.set_mesh(mesh), use_rules(config):
        model, params, step = load_parameters(run, mesh, options.step, options.best, options.average)
        result: dict[str, Any] = {"step": step, **Evaluator(config, prepared, model, mesh)(params)}
    if options.baseline:
        from transformer.data.division import split_texts
        from transformer.data.ngram import trigram_bits_per_byte

        texts = [(text.encode() for text in split_texts(config, name)) for name in ("train", "validation")]
        result["trigram_bits_per_byte"] = trigram_bits_per_byte(*texts)
    if options.as_json:
        print(json.dumps(result))
        return 0
    print(f"{options.workdir}, step {step}, the whole validation split ({result['tokens']:,} tokens)")
    print(f"  cross-entropy {result['cross_entropy']:.4f} nats a token, accuracy {result['accuracy']:.4f}")
    if "bits_per_byte" in result:
        print(f"  bits a byte   {result['bits_per_byte']:.4f}")
    if options.baseline:
        better = "the model is better" if result["bits_per_byte"] < result["trigram_bits_per_byte"] else "it is better"
        print(f"  bits a byte   {result['trigram_bits_per_byte']:.4f} of an interpolated byte trigram: {better}")
        plot = place(options.workdir) / "loss.png"
        print(f"  loss plot     {plot}" if plot.exists() else "  no loss plot")
    return 0


def generate(options: GenerateOptions) -> int:
    if problems := command.problems_of(options):
        raise ConfigError(problems)
    command.write_texts(options, *_open(options.workdir, options.config))
    return 0


def import_(options: ImportOptions) -> int:
    return huggingface.import_(options)


def export(options: ExportOptions) -> int:
    return huggingface.export(options, *_open(options.workdir, options.config))


def compare(options: CompareOptions) -> int:
    return huggingface.compare(options, *_open(options.workdir, options.config))


def study(options: StudyOptions) -> int:
    from transformer.studies.study import run_study

    if not options.seeds:
        raise ConfigError("--seeds has no value: give at least one")
    if "://" in options.workdir:
        raise ConfigError(f"--workdir = {options.workdir!r}: the directory of a study is local")
    run_study(options.study, options.config, options.seeds, options.only, Path(options.workdir).expanduser())
    return 0


def benchmark(options: BenchmarkOptions) -> int:
    return sys.modules[type(options).__module__].run(options)


def _open(workdir: str, config: Config) -> tuple[Any, Config, Any]:
    """Returns the run, the configuration to use it with here, and the mesh: the run's own where it fits."""
    from transformer.parallel import startup

    startup.start(config)

    import jax

    from transformer.checkpointing.fixed import contradictions
    from transformer.checkpointing.run import load_run
    from transformer.parallel.sharding import make_mesh

    run = load_run(place(workdir))
    if problems := [problem for problem in contradictions(run.config, config) if problem.startswith("model.")]:
        raise ConfigError([f"{workdir} holds a trained model, which stays as it is", *problems])
    size = config.evaluation.batch_size or config.train.batch_size
    config = replace(config, evaluation={"num_batches": 0, "batch_size": size})
    config = replace(config, model={"attention_implementation": "auto"})
    # Nothing is trained here, so only the batch of the evaluation has to divide; stages ask for as many microbatches.
    parts = max(1, config.parallel.stage)
    config = replace(config, train={"batch_size": size * parts, "num_microbatches": parts, "batch_warmup_steps": 0})
    if config.parallel == run.config.parallel and mesh_problems(config, jax.device_count()):
        # The run's own mesh is of another machine.
        shards = math.gcd(size, jax.device_count())
        # Devices that layers cannot be split over are left out.
        model = config.model
        tensor = math.gcd(jax.device_count() // shards, model.num_heads, model.ff_width, model.expert_dim)
        config = replace(config, parallel=dict.fromkeys(MESH_AXES, 1) | {"fsdp": shards, "tensor": tensor})
        return run, config, make_mesh(config, jax.devices()[: shards * tensor])
    return run, config, make_mesh(config)


def plan(options: PlanOptions) -> int:
    return sys.modules[PlanOptions.__module__].run(options)


def describe(options: DescribeOptions) -> int:
    result = describe_config(options.config)
    if options.as_json:
        print(json.dumps(result))
        return 0
    sizes = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    print(f"{result['parameters']:,} parameters, on a mesh of {sizes}")
    if result["active_parameters"] != result["parameters"]:
        print(f"{result['active_parameters']:,} parameters that a token passes through")
    for name, count in result["parameters_by_module"].items():
        print(f"  {name:<40}{count:>16,}")
    for label, flops in result["flops_per_token"].items():
        print(f"FLOPs a token, {label.replace('_', ' ')}: {flops:.4g}")
    products = result["forward_products"]
    total = sum(product["flops"] for product in products)
    print("matrix products of one sequence's forward pass, attention in full:")
    for product in products:
        name = "/".join(product[key] for key in ("stack", "part", "name"))
        print(f"  {name:<50} {product['flops']:>14.4g} FLOPs {product['flops'] / total:>7.1%}")
    print("bytes per device, before gradients and activations:")
    for name, size in result["bytes_per_device"].items():
        print(f"  {name:<40}{size:>16,}")
    print("names of dimensions, and the mesh axes that split them:")
    for name, split in result["rules"].items():
        print(f"  {name:<40}{', '.join(split) or '-'}")
    for name, reason in result["left_whole"].items():
        print(f"left whole: {name}: {reason}")
    for array in result["arrays"]:
        shape, split = " x ".join(map(str, array["shape"])) or "scalar", array["sharding"]
        print(f"  {array['name']:<50} {shape:<20} {split:<40} {array['bytes_per_device']:>14,}")
    return 0


def describe_config(config: Config) -> dict[str, Any]:
    """Returns what `describe` shows. -1 in the mesh stands for the simulated devices, or else for 1."""
    from transformer.parallel import startup

    startup.start(config)

    import jax
    from jax.sharding import AbstractMesh

    from transformer.checkpointing.run import for_platform, resolve
    from transformer.config import mesh_axes
    from transformer.models import flops, parameters
    from transformer.models.transformer import Transformer
    from transformer.objectives import vocabulary
    from transformer.optimizers import make_optimizer
    from transformer.parallel.rules import left_whole
    from transformer.parallel.sharding import rules_in_use, use_rules
    from transformer.training.state import abstract_state, state_shardings

    fixed = math.prod(size for axis in MESH_AXES if (size := getattr(config.parallel, axis)) > 0)
    num_devices = config.parallel.cpu_devices or fixed
    if problems := mesh_problems(config, num_devices):
        raise ConfigError(problems)
    axes = mesh_axes(config, num_devices)
    config = resolve(config, vocabulary.without_data(config))
    model = Transformer(for_platform(config.model, jax.default_backend()))
    specs = parameters.parameter_specs(model)
    optimizer = make_optimizer(config, specs)
    with use_rules(config):
        rules = dict(rules_in_use.value)
        mesh = AbstractMesh(tuple(axes.values()), tuple(axes))
        layouts: Any = state_shardings(model, optimizer, mesh, config.parallel)
        whole = left_whole(config.model, specs, axes)
    state = abstract_state(model, optimizer, layouts)
    arrays, totals = [], {"params": 0, "opt_state": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        split = [entry if isinstance(entry, str) else list(entry or ()) for entry in leaf.sharding.spec]
        shown = ", ".join(e if isinstance(e, str) else "+".join(e) or "-" for e in split)
        arrays.append(
            {"name": name, "shape": leaf.shape, "dtype": str(leaf.dtype), "sharding": shown, "bytes_per_device": size}
        )
        group = name.partition("/")[0]
        totals[group] = totals.get(group, 0) + size
    modules: dict[str, int] = {}
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=parameters.is_spec):
        name = "/".join(str(key.key) for key in path[:-1]) or str(path[-1].key)
        modules[name] = modules.get(name, 0) + spec.count
    length, source = config.data.sequence_length, source_length(config)
    return {
        "parameters": parameters.num_parameters(model),
        "active_parameters": flops.active_parameters(config.model, specs),
        "parameters_by_module": modules,
        "flops_per_token": {
            "training_attention_in_full": flops.training_flops_per_token(config.model, length, source_length=source),
            "training_attention_causal_half": flops.training_flops_per_token(config.model, length, True, source),
        },
        "forward_flops_per_sequence": flops.forward_flops(config.model, length, source),
        "forward_products": [dataclasses.asdict(item) for item in flops.forward_products(config.model, length, source)],
        "mesh": axes,
        "rules": rules,
        "left_whole": whole,
        "bytes_per_device": totals,
        "arrays": arrays,
    }


def implementations(options: ImplementationsOptions) -> int:
    from transformer.config.implementations import IMPLEMENTATIONS, MASKS, refusals

    print("| | runs on | masks | bias | soft cap | widths of heads | types | tested without the hardware |")
    print("|---|---|---|---|---|---|---|---|")
    for name, it in IMPLEMENTATIONS.items():
        masks = "all" if it.masks == MASKS else ", ".join(it.masks)
        yes = {True: "yes", False: "no"}
        cells = (masks, yes[it.bias], yes[it.soft_cap], it.heads, ", ".join(it.dtypes), it.tested)
        print(f"| `{name}` | {', '.join(it.platforms)} | {' | '.join(cells)} |")
    print("\nOf this configuration:")
    for name in IMPLEMENTATIONS:
        problems = "; ".join(f"{asking}: {takes}" for asking, takes in refusals(options.config, name))
        print(f"  {name}: {f'no, {problems}' if problems else 'yes'}")
    return 0


VERBS: dict[str, tuple[type[Options], str]] = {
    "prepare": (PrepareOptions, "make tokenizer and token shards"),
    "train": (TrainOptions, "train a model, or go on with a run"),
    "evaluate": (EvaluateOptions, "measure a run on the whole validation split"),
    "generate": (GenerateOptions, "continue prompts, or write about them: draw, or search with beams"),
    "import": (ImportOptions, "make a run of a published model, of a folder or of the hub"),
    "export": (ExportOptions, "write a run as transformers reads it"),
    "compare": (CompareOptions, "compare the model of a run with another's, array by array"),
    "study": (StudyOptions, f"many runs that differ in one thing: {', '.join(STUDIES)}"),
    "benchmark": (BenchmarkOptions, f"what machine and configuration can do: {', '.join(BENCHMARKS)}"),
    "plan": (PlanOptions, "memory, collectives and time of the step on a pod that is not here"),
    "describe": (DescribeOptions, "parameters, FLOPs, sharding and bytes of a configuration"),
    "implementations": (ImplementationsOptions, "what each implementation of attention can compute"),
}


def parse(arguments: Sequence[str]) -> Options:
    """Returns the options of a command line whose first word is the verb. Raises ConfigError with every mistake."""
    verb, *rest = arguments or ["--help"]
    if verb in ("-h", "--help"):
        _list("VERB", VERBS)
    if verb not in VERBS:
        raise ConfigError(f"{verb!r} is not a verb; there are {', '.join(VERBS)}{nearest(verb, tuple(VERBS))}")
    if verb == "study":
        return _parse_study(rest)
    if verb == "benchmark":
        return _parse_benchmark(rest)
    kind = VERBS[verb][0]
    return parse_options(kind, _with_flags(kind, rest), f"transformer {verb}")


def _with_flags(kind: type[Options], arguments: Sequence[str]) -> list[str]:
    """Returns the arguments of a verb that takes words, at its begin or at its end, with the words as options."""
    words, rest = list(getattr(kind, "WORDS", ())), list(arguments)
    given: list[str] = []
    while words and rest and rest[0][:1] != "-":
        given += [f"--{words.pop(0)}", rest.pop(0)]
    flags = [number for number, argument in enumerate(rest) if argument.startswith("--")]
    if words and flags:
        name, equals, _ = rest[flags[-1]].removeprefix("--").partition("=")
        own = {"json": bool} | typing.get_type_hints(kind)
        values = 0 if equals or own.get(name.replace("-", "_")) is bool else 1
        first = max(flags[-1] + 1 + values, len(rest) - len(words))
        given += [part for pair in zip((f"--{word}" for word in words), rest[first:], strict=False) for part in pair]
        rest = rest[:first]
    return [*given, *rest]


def function_of(verb: str) -> Any:
    """Returns the function that carries out a verb: that of its name, with a line after it where Python knows the word."""
    return getattr(sys.modules[__name__], f"{verb}_" if keyword.iskeyword(verb) else verb)


def _list(words: str, known: Mapping[str, tuple[Any, str]]) -> NoReturn:
    """Prints what can be asked for, and exits."""
    print(f"usage: transformer {words} [options]; transformer {words} --help shows them\n")
    print("\n".join(f"  {name:<15} {what}" for name, (_, what) in known.items()), flush=True)
    raise SystemExit(0)


def _parse_study(arguments: Sequence[str]) -> Options:
    """Returns the options of a study, whose name is the first word, and whose recipe is its own unless one is given."""
    name, *rest = arguments or [""]
    if {"-h", "--help"} & set(arguments) and name.startswith("-"):
        return parse_options(StudyOptions, arguments, f"transformer study {{{','.join(STUDIES)}}}")
    if name not in STUDIES:
        raise ConfigError(f"{name!r} is not a study, which are {', '.join(STUDIES)}{nearest(name, tuple(STUDIES))}")
    recipe = [] if _has_recipe(rest) else ["--config", STUDIES[name][1]]
    return parse_options(StudyOptions, ["--study", name, *recipe, *rest], f"transformer study {name}")


def _has_recipe(arguments: Sequence[str]) -> bool:
    return any(argument.partition("=")[0] == "--config" for argument in arguments)


def _parse_benchmark(arguments: Sequence[str]) -> Options:
    """Returns the options of a benchmark, whose name is the first word; each has its own."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        _list("benchmark NAME", BENCHMARKS)
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ConfigError(f"{name!r} is not a benchmark, which are {known}{nearest(name, tuple(BENCHMARKS))}")
    kind = importlib.import_module(BENCHMARKS[name][0]).Options
    if recipe := getattr(kind, "RECIPE", None):
        rest = [*([] if _has_recipe(rest) else ["--config", recipe]), *rest]
    flags = [
        part
        for word in getattr(kind, "WORDS", ())
        if rest and rest[0][:1] != "-"
        for part in (f"--{word}", rest.pop(0))
    ]
    options = parse_options(kind, [*flags, *rest], f"transformer benchmark {name}")
    for attribute, flag, is_directory in (("json_file", "--json", False), ("output", "--output", name == "rnn")):
        if path := getattr(options, attribute, ""):
            check_destination(flag, path, is_directory)
    return options


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status."""
    options = parse(arguments)
    return function_of(arguments[0])(options)


def main() -> None:
    """The console script `transformer`."""
    sys.exit(exit_status(run, sys.argv[1:]))

"""The command line: `transformer <verb>`; `VERBS` lists them."""

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
from transformer.config import (
    MESH_AXES,
    Config,
    ConfigError,
    keys,
    mesh_problems,
    nearest,
    place,
    replace,
    type_of,
)
from transformer.finetuning import command as finetuning
from transformer.finetuning.command import MergeOptions, UnmergeOptions
from transformer.huggingface import command as huggingface
from transformer.huggingface.command import CompareOptions, ExportOptions, ImportOptions
from transformer.inference import command
from transformer.inference.command import GenerateOptions
from transformer.inference.embed import EmbedOptions
from transformer.inference.predict_options import PredictOptions
from transformer.plans.command import PlanOptions
from transformer.run_options import RunOptions
from transformer.studies import STUDIES
from transformer.training.metrics import SCORES


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
class EvaluateOptions(RunOptions):
    """Measure a run on the whole validation split."""

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
    text: tuple[str, ...] = ()
    """Files or globs of other text to pretrain on (transfer)."""
    pretrained: str = ""
    """A run, such as `transformer import` makes, to begin with in place of a language model of the study's own (transfer)."""
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
    if objective_of(config).HAS_REFERENCE:
        prepared = importlib.import_module("transformer.training.reference").stored(prepared, run.workdir)
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
    unit = objective_of(config).UNIT
    print(f"{options.workdir}, step {step}, the whole validation split ({result['tokens']:,} {unit}s)")
    if "cross_entropy" not in result:
        numbers = {name: value for name, value in result.items() if name not in ("step", "tokens")}
        print("\n".join(f"  {name:<16}{value:.4f}" for name, value in numbers.items()))
        return 0
    accuracy = f", accuracy {result['accuracy']:.4f}" if "accuracy" in result else ""
    print(f"  cross-entropy {result['cross_entropy']:.4f} nats a {unit}{accuracy}")
    for name, label in SCORES.items():
        if name in result:
            print(f"  {label:<13} {result[name]:.4f}")
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


def embed(options: EmbedOptions) -> int:
    from transformer.inference.embed import problems_of, write_vectors

    if problems := problems_of(options):
        raise ConfigError(problems)
    write_vectors(options, *_open(options.workdir, options.config))
    return 0


def import_(options: ImportOptions) -> int:
    return huggingface.import_(options)


def export(options: ExportOptions) -> int:
    return huggingface.export(options, *_open(options.workdir, options.config))


def merge(options: MergeOptions) -> int:
    return finetuning.merge(options, *_open(options.workdir, options.config))


def unmerge(options: UnmergeOptions) -> int:
    return finetuning.unmerge(options, *_open(options.workdir, options.config))


def compare(options: CompareOptions) -> int:
    return huggingface.compare(options, *_open(options.workdir, options.config))


def predict(options: PredictOptions) -> int:
    run, config, mesh = _open(options.workdir, options.config)
    importlib.import_module("transformer.inference.predict").write_predictions(options, run, config, mesh)
    return 0


def study(options: StudyOptions) -> int:
    from transformer.studies.study import Shared, run_study

    if not options.seeds:
        raise ConfigError("--seeds has no value: give at least one")
    if "://" in options.workdir:
        raise ConfigError(f"--workdir = {options.workdir!r}: the directory of a study is local")
    directory = Path(options.workdir).expanduser()
    shared = Shared(options.seeds, directory, options.text, options.pretrained)
    run_study(options.study, options.config, options.only, shared)
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
    from transformer.describe import describe_config, text_of

    result = describe_config(options.config)
    print(json.dumps(result) if options.as_json else text_of(result))
    return 0


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
    "predict": (PredictOptions, "labels, numbers, answers or texts for the records of a file"),
    "embed": (EmbedOptions, "turn texts into vectors, for search and comparison"),
    "import": (ImportOptions, "make a run of a published model, of a folder or of the hub"),
    "export": (ExportOptions, "write a run as transformers reads it"),
    "merge": (MergeOptions, "make a run of an adapter and its base together"),
    "unmerge": (UnmergeOptions, "take an adapter out of such a run again"),
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
    """Returns the arguments of a verb that takes words, with those that belong to no option as the options they stand for."""
    words, given = list(getattr(kind, "WORDS", ())), []
    own = {"json": bool, "config": str} | {
        name: hint for name, hint in typing.get_type_hints(kind).items() if name != "config"
    }
    room = 0  # values that the option before may still have
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, _ = argument.removeprefix("--").replace("-", "_").partition("=")
            of = own.get(name) or (type_of(name) if name in keys() else str)
            room = 0 if equals or of is bool else len(arguments) if typing.get_origin(of) is tuple else 1
        elif words and not room:
            given.append(f"--{words.pop(0)}")
        else:
            room -= 1
        given.append(argument)
    return given


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

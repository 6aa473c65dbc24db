"""`transformer import`, `export` and `compare`: their options, and what they do and print."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from transformer.arguments import Json, Overrides, Recipe, Workdir
from transformer.config import Config, ConfigError, place
from transformer.run_options import RunOptions

Destination = Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")]


@dataclass(frozen=True)
class ImportOptions:
    """Make a run of a published model: a folder with config.json, safetensors and a tokenizer, or the name of one on the hub.

    The run has a checkpoint of step 0, and every verb takes it. What the model does not decide comes from the recipe.
    """

    WORDS: ClassVar[tuple[str, ...]] = ("path",)

    path: Destination = ""
    """The folder, or OWNER/NAME on the hub; may be given as the first word."""
    workdir: Workdir = ""
    """The run directory to make."""
    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class ExportOptions(RunOptions):
    """Write the model of a run as transformers reads it, then read it again and compare."""

    WORDS: ClassVar[tuple[str, ...]] = ("out",)

    out: Destination = ""
    """The folder to make; may be given as a word by itself."""
    format: Literal["huggingface", "peft"] = "huggingface"
    """Layout of the folder; `peft` is of an adapter alone, for the base in the other layout."""
    family: str = ""
    """model_type to write; empty: the first that says exactly what the model is."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the parameters; bfloat16 rounds them."""
    shard_size: float = 5.0
    """Gigabytes (10^9 bytes) of the largest file."""
    config: Overrides = field(default_factory=Config)


@dataclass(frozen=True)
class CompareOptions:
    """Compare the model of a run with another run's, or with a folder in Hugging Face's layout; exits with 1 if they differ."""

    WORDS: ClassVar[tuple[str, ...]] = ("workdir", "path")

    workdir: Workdir = ""
    """The run directory; may be given as the first word."""
    path: Destination = ""
    """The other run directory, or folder; may be given as the second word."""
    tolerance: float = 0.0
    """Largest norm of a difference, as a share of the array's norm, that counts as none."""
    as_json: Json = False
    """Print one JSON object."""
    config: Overrides = field(default_factory=Config)


def import_(options: ImportOptions) -> int:
    from transformer.parallel import startup

    if not options.path:
        raise ConfigError("PATH is missing: name the folder of the model, or OWNER/NAME on the hub")
    workdir = place(options.workdir)
    if not isinstance(workdir, Path):
        raise ConfigError(f"--workdir = {options.workdir!r}: import into a local directory, and copy that")
    startup.start(options.config)

    import jax

    from transformer.huggingface import importing, reading
    from transformer.huggingface.table import flat_specs
    from transformer.parallel.sharding import make_mesh, use_rules

    importing.one_process()
    begin = time.perf_counter()
    if (Path(options.path).expanduser() / "adapter_config.json").is_file():
        from transformer.huggingface import peft

        mesh = make_mesh(options.config)
        with jax.set_mesh(mesh), use_rules(options.config):
            print(peft.import_adapter(Path(options.path).expanduser(), workdir, options.config, mesh))
        return 0
    folder = importing.folder_of(options.path)
    _, model = reading.model_of(folder)  # what is wrong with it is told before anything of the mesh
    # Which axes there may be depends on the model.
    mesh = make_mesh(importing.run_config(model, options.config, options.config.data.tokenizer, workdir))
    with jax.set_mesh(mesh), use_rules(options.config):
        model = importing.import_model(folder, workdir, options.config, mesh)
    count = sum(spec.count for spec in flat_specs(model).values())
    seconds = time.perf_counter() - begin
    kind = f"{folder.config['model_type']}, {model.num_layers} layers of width {model.width}, {count:,} parameters"
    print(f"{options.workdir}: {kind}, in {seconds:.1f} s")
    return 0


def export(options: ExportOptions, run: Any, config: Config, mesh: Any) -> int:
    import jax

    from transformer.checkpointing.loading import load_merged
    from transformer.huggingface import exporting, importing, published
    from transformer.huggingface.header import read_json
    from transformer.parallel.sharding import use_rules

    if not options.out:
        raise ConfigError("OUT is missing: name the folder to make")
    if not 0 < options.shard_size < 1e6:
        raise ConfigError(f"--shard-size = {options.shard_size}: must be more than 0, in gigabytes")
    importing.one_process()
    if options.format == "peft":
        from transformer.huggingface import peft

        with jax.set_mesh(mesh), use_rules(config):
            print(peft.export_adapter(run, mesh, Path(options.out).expanduser(), options.family, *_choice(options)))
        return 0
    origin = run.workdir / "tokenizer" / published.PUBLISHED / "config.json"
    preferred = read_json(origin).get("model_type", "") if isinstance(origin, Path) and origin.is_file() else ""
    family = exporting.family_for(run.config.model, options.family, preferred)
    if run.config.model.num_labels and (pooling := run.config.objective.pooling) not in ("auto", "first"):
        problem = (
            f"objective.pooling = {pooling!r}: the classifiers of {family.model_type} there read a text's first token"
        )
        raise ConfigError(f"{problem}, so that the exported one would be another model")
    target = Path(options.out).expanduser()
    with jax.set_mesh(mesh), use_rules(config):
        _, params, step = load_merged(run, mesh, *_choice(options))
        size = int(options.shard_size * 1e9)
        notes = exporting.export_model(run, run.config.model, params, step, target, family, options.dtype, size)
    [architecture] = read_json(target / "config.json")["architectures"]
    print(f"{options.out}: {architecture} of step {step}, read again and compared")
    for note in notes:
        print(note)
    return 0


def _choice(options: ExportOptions) -> tuple[int | None, bool, int]:
    return options.step, options.best, options.average


def compare(options: CompareOptions, run: Any, config: Config, mesh: Any) -> int:
    import dataclasses

    import jax

    from transformer.checkpointing.loading import load_merged
    from transformer.checkpointing.run import CORPUS, load_run
    from transformer.huggingface import comparing, importing, reading
    from transformer.parallel.sharding import use_rules

    if not options.path:
        raise ConfigError("PATH is missing: name the other run directory, or folder")
    if not options.tolerance >= 0:
        raise ConfigError(f"--tolerance = {options.tolerance}: must not be negative")
    with jax.set_mesh(mesh), use_rules(config):
        other = place(options.path)
        if (other / CORPUS).is_file():
            second = load_run(other)
            model, params = second.config.model, load_merged(second, mesh)[1]
        else:
            model, params = reading.read(importing.folder_of(options.path).path, mesh)
        own = run.config.model, load_merged(run, mesh)[1]
        found = comparing.compare_models(own, (model, params))
    is_equal = found.is_equal(options.tolerance)
    if options.as_json:
        print(json.dumps({"equal": is_equal, **dataclasses.asdict(found)}))
        return 0 if is_equal else 1
    for sentence in (*found.config, *found.shapes):
        print(sentence)
    differing = [item for item in found.arrays if item.largest > 0]
    for item in differing:
        print(f"{item.name:<50} largest {item.largest:<12.4g} relative {item.relative:.4g}")
    print(f"{len(found.arrays) - len(differing)} of {len(found.arrays)} arrays are equal bit by bit")
    return 0 if is_equal else 1

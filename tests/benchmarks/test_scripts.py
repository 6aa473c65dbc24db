"""The scripts of benchmarks/: that they ask for what there is, and that their reports add up."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_packaging import Command, check

from transformer.arguments import parse
from transformer.benchmarks.step import Options
from transformer.checkpointing.run import resolve
from transformer.config import validate
from transformer.objectives import vocabulary

ROOT = Path(__file__).parent.parent.parent


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look their module up
    spec.loader.exec_module(module)
    return module


PEERS, GPU = script("peers"), script("gpu")
COMMANDS = GPU.commands("nanoGPT", "input.txt", "python3", Path("results"))


@pytest.mark.parametrize("name", PEERS.SHAPES)
def test_our_step_has_the_shape_that_the_peers_get(name: str) -> None:
    shape = PEERS.SHAPES[name]
    config = validate(parse(Options, shape.options.split(), "benchmark step").config)
    config = resolve(config, vocabulary.without_data(config))
    model = config.model
    assert (model.num_layers, model.width, model.num_heads) == (shape.layers, shape.width, shape.heads)
    assert (config.train.batch_size, config.data.sequence_length) == (shape.batch, shape.context)
    assert (model.vocab_size, model.dropout, model.positions) == (shape.vocabulary, shape.dropout, "learned")
    assert model.compute_dtype == ("bfloat16" if shape.gpu else "float32")
    # What is the same everywhere: four times as wide in the middle, tied embeddings, no biases.
    assert model.ff_width == 4 * shape.width and model.tied_embeddings and not model.biases


def test_the_report_gives_ratios_by_round_and_mfu_where_it_is_known() -> None:
    def arm(name: str, seconds: list[list[float]], **facts: Any) -> Any:
        none: Any = None
        return PEERS.Arm(name, none, "abc", {"jax": "1"}, facts, seconds, {"dot": 12.3} if facts else {})

    ours = {"flops, attention in full": 2e12, "flops, attention causal half": 1e12, "device": "cpu"}
    machine = {"processor": "some", "cores": 2, "load_at_start": 0.0}
    for peak, share in ((1e13, "| 10.0% | 5.0% |"), (None, "| 0.500 (0.500 to 0.500) |\n")):
        arms = [arm("transformer", [[1.0, 1.0], [4.0, 4.0]], **ours, peak=peak)]
        arms.append(arm("nanogpt", [[2.0, 2.0], [8.0, 8.0]]))
        result, text = PEERS.report(arms, "S", machine, "python benchmarks/peers.py S")
        assert result["systems"][1]["ours_relative"] == [0.5, 0.5]
        assert "- transformer: dot 12\n" in text and "- nanogpt:" not in text and "Kept memory" not in text
        # Of the medians, 2.5 and 5 seconds.
        assert share.replace("10.0%", "8.0%").replace("5.0%", "4.0%") in text


def test_a_peer_that_is_not_there_is_a_mistake() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "peers.py"), "S", "--peer", "nanogpt=/nowhere,python"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "must be NAME=CHECKOUT,PYTHON" in done.stderr


@pytest.mark.parametrize("title", COMMANDS)
def test_what_runs_on_a_gpu_is_sound(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "input.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    first, *rest = COMMANDS[title]
    words = [first, *rest] if first == "transformer" else ["python", first, *rest]
    check(Command(ROOT / "benchmarks" / "gpu.py", tuple(words)), tmp_path)

"""Runs that begin with the parameters of others."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import CHECKPOINTS, for_platform, load_run
from transformer.checkpointing.transfer import flat
from transformer.config import Config, ConfigError, from_json, replace, to_json
from transformer.config.absolute import absolute_start
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.models.parameters import init_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.start_from import opened
from transformer.training.state import state_shardings

Make = Callable[..., Config]

QUIET = {"every_steps": 0, "sample_tokens": 0}


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes a run directory as an import leaves it: parameters alone, and nothing trained."""

    def make(config: Config, name: str = "source", steps: tuple[int, ...] = (0,)) -> Path:
        config = replace(config, model={"vocab_size": config.model.vocab_size or 260, "num_positions": 16})
        workdir = tmp_path / name
        ByteTokenizer().save(workdir / "tokenizer")
        (workdir / "corpus.json").write_text(json.dumps({"fingerprint": "none"}))
        (workdir / "config.json").write_text(to_json(config))
        model = Transformer(for_platform(config.model, "cpu"))
        with Checkpoints(workdir / CHECKPOINTS, config.checkpoint) as checkpoints:
            for step in steps:
                checkpoints.save(step, init_parameters(model, jax.random.key(100 + step)), {})
        return workdir

    return make


def parameters_of(workdir: Path, **which: Any) -> dict[str, np.ndarray]:
    run = load_run(workdir)
    mesh = make_mesh(replace(run.config, parallel={"fsdp": 8, "replica": 1}))
    return jax.device_get(flat(load_parameters(run, mesh, **which)[1]))


def begun(config: Config, tmp_path: Path) -> tuple[dict[str, np.ndarray], list[str], Config]:
    """Returns the parameters before the first step, what is told of them, and the configuration, without training."""
    from transformer.data.prepared import Prepared

    config, start = opened(config, tmp_path / "new")
    assert start is not None
    tokenizer: Any = start.source.tokenizer
    extra = {"vocab_size": config.model.vocab_size or 260, "num_positions": config.model.num_positions or 16}
    config = replace(config, model=extra)
    model = Transformer(for_platform(config.model, "cpu"))
    config = start.check(config, Prepared(tokenizer, "data", ()), model)
    optimizer = make_optimizer(config, parameter_specs(model))
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        shardings = state_shardings(model, optimizer, mesh)
        state = start.state(config, model, optimizer, shardings, loop.restore)
    assert jax.tree.map(lambda leaf: leaf.sharding, state.params) == shardings.params
    return jax.device_get(flat(state.params)), start.lines, config


def test_a_cooldown_equals_the_uninterrupted_run(
    make_run: Make, tmp_path: Path, read_state: Any, read_lines: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs with constant phases that coincide; from a step of the longer one the end of the shorter one is computed."""
    wsd = {"schedule": "wsd", "warmup_steps": 2, "decay_share": 0.5, "final_ratio": 0.0}
    whole = make_run(optimizer=wsd, train={"num_steps": 8}, evaluation=QUIET)
    assert loop.run(whole, tmp_path / "whole") == 0
    every = {"keep_latest": 9}
    long = replace(whole, optimizer={"decay_share": 0.25}, train={"num_steps": 16}, checkpoint=every)
    assert loop.run(long, tmp_path / "long") == 0
    start = {"run": str(tmp_path / "long"), "step": 4, "optimizer": "keep", "progress": "keep"}
    branch = replace(whole, init_from=start)
    capsys.readouterr()
    assert loop.run(branch, tmp_path / "branch") == 0
    told = capsys.readouterr().out
    assert "corpus: the source's, read on from step 4" in told and "optimizer: the state of the source" in told

    left, right = read_state(tmp_path / "whole"), read_state(tmp_path / "branch")
    assert left.keys() == right.keys()
    assert [name for name in left if left[name].tobytes() != right[name].tobytes()] == []
    lines = read_lines(tmp_path / "whole")
    assert read_lines(tmp_path / "branch") == [line for line in lines if line["step"] > 4]
    assert lines[3]["learning_rate"] > lines[6]["learning_rate"] > lines[7]["learning_rate"]
    assert read_lines(tmp_path / "long")[7]["loss"] != lines[7]["loss"]

    # What is branched needs its source no more; it knows where it began.
    shutil.rmtree(tmp_path / "long")
    assert loop.run(branch, tmp_path / "branch") == 0
    assert from_json((tmp_path / "branch" / "config.json").read_text()).init_from.run == start["run"]
    assert "begins with" not in capsys.readouterr().out
    for other in ({"run": "elsewhere"}, {"run": ""}):
        with pytest.raises(ConfigError, match="init_from.run|contradicts"):
            loop.run(replace(branch, init_from=other | {"step": 4}), tmp_path / "branch")

"""Runs of adapters: what they keep, how they go on, what uses them, and bases that are not theirs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.checkpointing.loading import load_adapter, load_merged, load_parameters
from transformer.checkpointing.run import load_run
from transformer.cli import run as command
from transformer.config import Config, ConfigError, ModelConfig, replace
from transformer.parallel.sharding import make_mesh
from transformer.training.loop import run


def test_an_adapter_is_kept_apart_from_its_base(
    make_run: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rare = {"evaluation": {"every_steps": 0, "sample_tokens": 0}, "checkpoint": {"every_steps": 0}}
    config = make_run(train={"num_steps": 2}, **rare)
    base, workdir = tmp_path / "base", tmp_path / "adapter"
    assert run(config, base) == 0
    config = replace(config, adapter={"kind": "dora", "rank": 2, "base": "int4", "base_run": str(base)})
    assert run(config, workdir) == 0
    assert "parameters are trained (" in "".join(capsys.readouterr())
    # It goes on where it was, by the same command.
    config = replace(config, train={"num_steps": 4})
    assert run(config, workdir) == 0
    opened, mesh = load_run(workdir), make_mesh(config)
    with jax.set_mesh(mesh):
        _, trained, step = load_adapter(opened, mesh)
        names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
        assert step == 4 and names == {"lora_a", "lora_b", "magnitude"}
        _, params, _ = load_parameters(opened, mesh)
        assert "codes" in params["decoder"]["layers"]["mixer"]["query"]
        expected = load_merged(opened, mesh)[1]
    out = tmp_path / "merged"
    assert command(["merge", "--workdir", str(workdir), "--output", str(out)]) == 0
    with jax.set_mesh(mesh):
        found = load_parameters(load_run(out), mesh)[1]
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.array_equal(one, other)
    assert command(["generate", "--workdir", str(workdir), "--prompt", "alpha", "--max-tokens", "2"]) == 0
    with pytest.raises(ConfigError, match="is there already"):
        command(["merge", "--workdir", str(workdir), "--output", str(out)])


@pytest.mark.slow
def test_another_base_is_refused(make_run: Callable[..., Config], tmp_path: Path) -> None:
    """One of another seed under the same name, and one of another shape."""
    rare = {"evaluation": {"every_steps": 0, "sample_tokens": 0}, "checkpoint": {"every_steps": 0}}
    config = make_run(train={"num_steps": 2}, **rare)
    base, workdir = tmp_path / "base", tmp_path / "adapter"
    assert run(config, base) == 0
    assert run(replace(config, seed=1), tmp_path / "other") == 0
    config = replace(config, adapter={"kind": "lora", "rank": 2, "base_run": str(base)})
    assert run(config, workdir) == 0
    base.rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"the base of the adapter .*; if it has moved, change 'run' in"):
        command(["generate", "--workdir", str(workdir)])
    (tmp_path / "other").rename(base)
    with pytest.raises(ConfigError, match="is not the base of this adapter: its checkpoint 2 has the fingerprint"):
        command(["generate", "--workdir", str(workdir)])
    wide = replace(config, model={"width": 32})
    with pytest.raises(ConfigError, match=r"model.width = 32, and adapter.base_run = .* has 16"):
        run(wide, tmp_path / "wide")
    assert not (tmp_path / "wide").exists()


def test_a_base_decides_model_and_tokenizer(make_run: Callable[..., Config], tmp_path: Path) -> None:
    """Where the configuration says nothing; and it may have a row more than the task needs, for what stands in the place of others."""
    rare = {"evaluation": {"every_steps": 0, "sample_tokens": 0}, "checkpoint": {"every_steps": 0}}
    config = make_run(train={"num_steps": 1}, model={"architecture": "encoder"}, **rare)
    base, workdir = tmp_path / "base", tmp_path / "adapter"
    masked = replace(config, objective={"name": "masked_lm", "mask_rate": 0.3})
    assert run(masked, base) == 0
    task = replace(config, objective={"name": "masked_lm", "mask_rate": 0.3, "mask_token": 0})
    task = replace(task, model=vars(ModelConfig()) | {"architecture": "encoder"})
    task = replace(task, adapter={"kind": "lora", "rank": 2, "base_run": str(base)})
    for num_steps in (1, 2):
        assert run(replace(task, train={"num_steps": num_steps}), workdir) == 0
    ours, theirs = load_run(workdir), load_run(base)
    assert ours.config.model == theirs.config.model and theirs.config.model.width == 16
    assert ours.config.model.vocab_size == theirs.tokenizer.vocab_size + 1
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "lora"}, "adapter.kind = 'lora' needs adapter.base_run"),
        ({"base": "nf4"}, "adapter.base = 'nf4' is of an adapter"),
        ({"kind": "lora", "base_run": "x", "rank": 0}, "adapter.rank = 0: must be greater than 0"),
        ({"kind": "lora", "base_run": "x", "dropout": 1.0}, "adapter.dropout = 1.0: must be a share"),
        ({"kind": "lora", "base_run": "x", "targets": ()}, "needs adapter.targets"),
    ],
)
def test_mistakes_have_one_sentence(change: dict[str, Any], message: str) -> None:
    from transformer.config import problems_of

    problems = problems_of(replace(Config(), adapter=change))
    assert len(problems) == 1 and message in problems[0], problems

"""The optimizer's moments on the host: where they lie, and that nothing else is different."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from transformer.config import Config, problems_of, replace
from transformer.models.parameters import parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import make_mesh
from transformer.training import loop
from transformer.training.state import create_state, state_shardings
from transformer.training.step import compile_step, make_train_step

ALONE, SPLIT = {"replica": 1, "fsdp": 1, "tensor": 1}, {"replica": 2, "fsdp": 2, "tensor": 2}


def kinds(state: Any) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state) if leaf.ndim}


@pytest.mark.parametrize(
    ("optimizer", "parallel"),
    [
        pytest.param("adamw", ALONE, id="adamw, one device"),
        pytest.param("adamw", SPLIT, id="adamw, eight devices", marks=pytest.mark.slow),
        pytest.param("muon", ALONE, id="muon, one device", marks=pytest.mark.slow),
        pytest.param("muon", SPLIT, id="muon, eight devices", marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_same_to_the_bit(
    optimizer: str, parallel: dict[str, int], tiny_config: Any, tiny_batch: Any
) -> None:
    found = []
    for offload in (False, True):
        config = tiny_config(
            parallel={**parallel, "offload_optimizer": offload},
            optimizer={"name": optimizer},
            model={"num_layers": 1},
        )
        mesh = make_mesh(config, jax.devices()[: math.prod(parallel.values())])
        model = Transformer(config.model)
        rule = make_optimizer(config, parameter_specs(model))
        shardings = state_shardings(model, rule, mesh, config.parallel)
        with jax.set_mesh(mesh):
            state = create_state(config, model, rule, shardings)
            step = compile_step(
                make_train_step(config, model, rule, shardings), state, tiny_batch(config, 0), shardings, mesh
            )
            for seed in range(3):
                assert kinds(state.opt_state) == {"pinned_host" if offload else "device"}
                assert kinds(state.params) == {"device"}
                state, _ = step(state, tiny_batch(config, seed))
        assert any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(state.opt_state)) if leaf.ndim)
        found.append(jax.device_get(state))
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.slow
def test_a_run_may_move_its_moments_to_the_host_and_back(make_run: Any, assert_same_run: Any, tmp_path: Path) -> None:
    """Four steps here, four more there, four more here: as a run that was given all and stays where it is."""
    assert loop.run(make_run(), tmp_path / "whole") == 0
    for num_steps, offload in ((4, False), (8, True), (12, False)):
        config = make_run(train={"num_steps": num_steps}, parallel={"offload_optimizer": offload})
        assert loop.run(config, tmp_path / "moved") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "moved")


def test_an_average_is_evaluated_where_the_devices_are() -> None:
    for optimizer in ({"ema_decay": 0.9}, {"name": "schedule_free", "schedule": "constant"}):
        config = replace(Config(), parallel={"offload_optimizer": True}, optimizer=optimizer)
        (problem,) = problems_of(config)
        assert problem.startswith("parallel.offload_optimizer = True: ")

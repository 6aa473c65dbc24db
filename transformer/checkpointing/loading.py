"""The parameters of a run, for whatever uses them and trains no more."""

import functools
import importlib
from typing import Any

import jax
from jax.sharding import Mesh

from transformer.checkpointing.checkpoints import Checkpoints
from transformer.checkpointing.run import CHECKPOINTS, Run, make_model
from transformer.config import ConfigError, replace
from transformer.models.parameters import Tree, divide, map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import sharding


def load_parameters(
    run: Run, mesh: Mesh, step: int | None = None, best: bool = False, average: int = 1
) -> tuple[Transformer, Tree, int]:
    """Returns the model, its parameters laid out over `mesh`, and their step: the latest unless told otherwise.

    With `average`, the parameters are the mean of those of that many checkpoints, the last of them that of the step
    (Vaswani et al. 2017, arXiv:1706.03762, section 6.1). Raises ConfigError if there are not as many.
    """
    model, params, chosen = load_adapter(run, mesh, step, best, average)
    if run.config.adapter.kind != "none":
        params = importlib.import_module("transformer.checkpointing.bases").complete(run, model, params, mesh)
    return model, params, chosen


def load_adapter(
    run: Run, mesh: Mesh, step: int | None = None, best: bool = False, average: int = 1
) -> tuple[Transformer, Tree, int]:
    """Returns the same, but of an adapter's run no more than its checkpoints have: what is trained."""
    # An implementation of attention was named for the machine that trains, and for whole sequences.
    config = replace(run.config, model={"attention_implementation": "auto"})
    model = make_model(config, jax.default_backend())
    specs, _ = divide(parameter_specs(model), parameter_specs(model))
    abstract = map_specs(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding(mesh, spec.axes, spec.shape)), specs
    )
    *others, chosen = choose(run, step, best, average)
    with Checkpoints(run.workdir / CHECKPOINTS) as checkpoints:
        # One after another, so that no more than two are in memory.
        params = checkpoints.restore(chosen, params=abstract)["params"]
        for number, at in enumerate(reversed(others), start=2):
            params = _toward(params, checkpoints.restore(at, params=abstract)["params"], number)
        return model, params, chosen


def choose(run: Run, step: int | None = None, best: bool = False, average: int = 1) -> list[int]:
    """Returns the steps of the `average` checkpoints that are asked for, the last of them the one that `step` or `best`
    names, the latest if neither does. Raises ConfigError if there are none."""
    directory = run.workdir / CHECKPOINTS
    if not directory.is_dir():
        raise ConfigError(f"{run.workdir} has no checkpoint yet")
    with Checkpoints(directory) as checkpoints:
        available = checkpoints.steps()
        chosen = (checkpoints.best_step() if best else checkpoints.latest_step()) if step is None else step
    listed = ", ".join(map(str, available)) or "none"
    if chosen not in available:
        wanted = "with a validation loss" if chosen is None else f"of step {chosen}"
        raise ConfigError(f"{run.workdir} has no checkpoint {wanted}; there are: {listed}")
    until = [at for at in available if at <= chosen]
    if not 0 < average <= len(until):
        count = f"{len(until)} checkpoint{'s' * (len(until) != 1)} up to step {chosen}"
        advice = "checkpoint.keep_latest says how many a run keeps"
        raise ConfigError(f"{average} checkpoints cannot be averaged: {run.workdir} has {count}; {advice}")
    return until[-average:]


def load_merged(run: Run, mesh: Mesh, *choice: Any) -> tuple[Transformer, Tree, int]:
    """Returns the same for a model without adapters: what they add is in its matrices."""
    model, params, step = load_parameters(run, mesh, *choice)
    if run.config.adapter.kind == "none":
        return model, params, step
    merged = importlib.import_module("transformer.models.adapters").merged(model, params)
    return Transformer(model.config), merged, step


@functools.partial(jax.jit, donate_argnums=0)
def _toward(mean: Tree, other: Tree, number: Any) -> Tree:
    """Returns the mean of `number` trees, of which `other` is the last and `mean` is that of those before."""
    return jax.tree.map(lambda old, new: old + (new - old) / number, mean, other)

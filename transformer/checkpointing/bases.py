"""What an adapter is for: the run whose parameters it adds to, and leaves where they are.

The run of an adapter holds the adapter alone and, in base.json, where its base is, which checkpoint of it, and a fingerprint of all
its values. Another base is refused, whatever has happened to the directory since.
"""

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt32

from transformer.checkpointing.fixed import MAY_CHANGE
from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import Run, load_run
from transformer.config import Config, ConfigError, get, keys, place, write_atomically
from transformer.data.tokenizers import Tokenizer
from transformer.models import adapters
from transformer.models.parameters import ParameterSpec, Tree, divide, is_spec, join, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import sharding

BASE = "base.json"

MAY_DIFFER = (*MAY_CHANGE, "model.num_labels", "model.num_positions")
"""Keys of a model that its base need not share: shapes are compared by themselves."""


@dataclass(frozen=True)
class Base:
    """A base, as the run of an adapter knows it."""

    run: Run
    step: int | None = None
    """The checkpoint; None: the latest, for an adapter that begins."""
    fingerprint: str = ""

    def parameters(self, model: Transformer, mesh: Mesh) -> tuple[Tree, dict[str, Any]]:
        """Returns the base's parameters by the adapted model's names, and what base.json says of them.

        Raises ConfigError if they are others than those that the adapter was begun with, or do not fit the model.
        """
        _, params, step = load_parameters(self.run, mesh, self.step)
        found = fingerprint(params)
        if self.fingerprint not in ("", found):
            problem = (
                f"its checkpoint {step} has the fingerprint {found}, and the adapter's base had {self.fingerprint}"
            )
            raise ConfigError(f"{self.run.workdir} is not the base of this adapter: {problem}")
        if problems := misfits(model, params):
            raise ConfigError([f"{self.run.workdir} is not a base for this adapter: {problem}" for problem in problems])
        return params, {"run": str(_absolute(self.run.workdir)), "step": step, "fingerprint": found}

    def under(self, state: Any, model: Transformer, mesh: Mesh, files: Path | None, begin: Any = None) -> Any:
        """Returns a training state with the base's parameters in it, and writes base.json to `files`.

        If the run begins, so do arrays that are the base's own, and the optimizer's state, made by `begin`.
        """
        params, known = self.parameters(model, mesh)
        held = frozen(model, params, mesh)
        if begin is not None:
            trained = adapters.begun(state.params, params)
            state = dataclasses.replace(state, params=trained, opt_state=begin(trained))
        if files is not None:
            write_atomically(files / BASE, json.dumps(known, indent=2) + "\n")
        return dataclasses.replace(state, frozen=held)


def begin(config: Config, tokenizer: Tokenizer, workdir: Any) -> Base:
    """Returns the base of a run that trains an adapter, which may stand in `workdir` already.

    Raises ConfigError if the base has another model or another tokenizer.
    """
    run = load_run(place(config.adapter.base_run))
    problems = [
        f"{key} = {get(config, key)!r}, and adapter.base_run = {config.adapter.base_run!r} has {get(run.config, key)!r}"
        for key in keys()
        if key.startswith("model.") and key not in MAY_DIFFER and get(config, key) != get(run.config, key)
    ]
    if run.tokenizer.fingerprint != tokenizer.fingerprint:
        advice = f"the base's own lies in {run.workdir / 'tokenizer'}"
        problems.append(f"data.tokenizer: adapter.base_run = {config.adapter.base_run!r} has another one; {advice}")
    if problems:
        raise ConfigError(problems)
    if not (workdir / BASE).exists():
        return Base(run)
    known = json.loads((workdir / BASE).read_text())
    return Base(run, known["step"], known["fingerprint"])


def base_of(run: Run) -> Base:
    """Returns the base of a run that holds an adapter."""
    if not (run.workdir / BASE).exists():
        raise ConfigError(f"{run.workdir} holds an adapter, but no {BASE} that says what for")
    known = json.loads((run.workdir / BASE).read_text())
    try:
        return Base(load_run(place(known["run"])), known["step"], known["fingerprint"])
    except ConfigError as error:
        problem = f"the base of the adapter {run.workdir}: {error}"
        raise ConfigError(f"{problem}; if it has moved, change 'run' in {run.workdir / BASE}") from error


def complete(run: Run, model: Transformer, trained: Tree, mesh: Mesh) -> Tree:
    """Returns an adapter's arrays together with those of its base."""
    base, _ = base_of(run).parameters(model, mesh)
    return join(trained, frozen(model, base, mesh))


def frozen(model: Transformer, base: Tree, mesh: Mesh) -> Tree:
    """Returns what the adapted model has of its base, map by map so that no second copy of the whole is in memory.

    It empties `base` of what it keeps in few bits.
    """
    specs = divide(parameter_specs(model), parameter_specs(model))[1]

    def made(spec: ParameterSpec, function: Any, *given: Any) -> Any:
        return jax.jit(function, out_shardings=sharding(mesh, spec.axes, spec.shape))(*given)

    for path, linear in adapters.linear_maps(model, adapters.AdaptedLinear).items():
        own, place = adapters.at(specs, path), adapters.at(base, path)
        if linear.adapter.base != "none":
            kernel = place.pop("kernel")
            place |= adapters.in_few_bits(linear, kernel, lambda spec: sharding(mesh, spec.axes, spec.shape))
            del kernel
        if linear.norm_squared is not None:
            place["norm_squared"] = made(own["norm_squared"], functools.partial(adapters.norm_squared, linear), place)
    return divide(base, _only(parameter_specs(model), base))[1]


def _only(specs: dict[Any, Any], tree: dict[Any, Any]) -> dict[Any, Any]:
    """Returns the declarations of what is in `tree`."""
    return {name: spec if is_spec(spec) else _only(spec, tree[name]) for name, spec in specs.items() if name in tree}


def misfits(model: Transformer, base: Tree) -> list[str]:
    """Returns a sentence for each parameter of the base that the adapted model has in another shape, or lacks, and the other
    way round; a model may have new ones that are trained as a whole."""
    plain = Transformer(model.config)
    names = _named(parameter_specs(model))
    wanted, held = _named(parameter_specs(plain)), _named(base)
    fresh = {name for name in wanted.keys() - held.keys() if name in names and not names[name].is_frozen}
    problems = [f"{name} {held[name].shape} has no place in the model" for name in sorted(held.keys() - wanted.keys())]
    problems += [f"it has no {name} {wanted[name].shape}" for name in sorted(wanted.keys() - held.keys() - fresh)]
    for name in sorted(wanted.keys() & held.keys()):
        if tuple(held[name].shape) != wanted[name].shape:
            problems.append(f"{name} is {tuple(held[name].shape)}, and the adapter is for {wanted[name].shape}")
    return problems


def _named(tree: Tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _absolute(path: Any) -> Any:
    return path.absolute() if isinstance(path, Path) else path


def fingerprint(params: Tree) -> str:
    """Returns a hash of names, shapes and all bits of some parameters, the same however they are laid out."""
    found = hashlib.blake2b(digest_size=16)
    for name, leaf in sorted(_named(params).items()):
        found.update(f"{name} {tuple(leaf.shape)} {np.asarray(_checksum(leaf)).tolist()}\n".encode())
    return found.hexdigest()


@jax.jit
def _checksum(x: Float[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns two sums of all bits, each value's weighted by a hash of its place; whole numbers add up in any order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    mixed = (place ^ (place >> 16)) * jnp.uint32(0x7FEB352D)
    mixed = mixed ^ (mixed >> 15)
    weights = mixed | 1, (mixed * jnp.uint32(0x846CA68B)) | 1
    return jnp.stack([jnp.sum(bits * weight, dtype=jnp.uint32) for weight in weights])

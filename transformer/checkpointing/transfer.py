"""Which parameters of one model another begins with, and how they are made to fit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from transformer.config import ConfigError, InitFromConfig, nearest
from transformer.config.path_patterns import matches, unused
from transformer.models.parameters import ParameterSpec, Tree, is_spec

Fit = Callable[[Array], Array]


@dataclass(frozen=True)
class Transfer:
    """What becomes of each parameter, by its path in the new model or, of what is left, in the source."""

    same: dict[str, str] = field(default_factory=dict)
    """Loaded as they are: the path in the source."""
    fitted: dict[str, tuple[str, Fit, str]] = field(default_factory=dict)
    """Loaded in part, or with more than there was: the path in the source, what makes them fit, and that in words."""
    new: tuple[str, ...] = ()
    left: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Returns all of it in words."""
        found = [f"loaded: {', '.join(_renamed(new, old) for new, old in self.same.items()) or 'nothing as it is'}"]
        found += [f"loaded: {_renamed(new, old)}: {words}" for new, (old, _, words) in self.fitted.items()]
        found += [f"begins as new: {', '.join(self.new)}"] if self.new else []
        return found + ([f"left: {', '.join(self.left)}"] if self.left else [])


def _renamed(new: str, old: str) -> str:
    return new if new == old else f"{new} (from {old})"


def flat(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of a tree of parameters, or of something about each, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def transfer(start: InitFromConfig, source: Tree, target: Tree, label: str) -> Transfer:
    """Returns what of a model with the specs `source`, called `label`, one with the specs `target` begins with.

    Raises ConfigError with every parameter that has no counterpart, or one of another shape, and is not allowed to.
    """
    old, new = flat(source), flat(target)
    problems = [
        f"init_from.{name} = {pattern!r}: no parameter matches{nearest(pattern, list(known))}; they are {', '.join(known)}"
        for name, known in (
            *((name, {**new, **old}) for name in ("include", "exclude")),
            ("allow_missing", new),
            ("allow_extra", old),
        )
        for pattern in unused(getattr(start, name), list(known))
    ]
    same: dict[str, str] = {}
    fitted: dict[str, tuple[str, Fit, str]] = {}
    fresh: list[str] = []
    unfit: set[str] = set()
    for path, spec in new.items():
        place = _place(start.rename, path)
        if not _is_chosen(start, path):
            fresh.append(path)
        elif place not in old:
            fresh.append(path)
            if not matches(start.allow_missing, path):
                where = f"{path} {spec.shape} is not in {label}"
                problems.append(f"{where}: let it begin as new by init_from.allow_missing, or by init_from.exclude")
        elif _is_same(old[place], spec):
            same[path] = place
        else:
            fits = _fit(start, old[place], spec)
            if isinstance(fits, str):
                unfit.add(place)
                shapes = f"{path} is {spec.shape}, and {old[place].shape} in {label}"
                problems.append(f"{shapes}: {fits}; init_from.exclude lets it begin as new")
            else:
                fitted[path] = (place, *fits)
    used = {*same.values(), *(place for place, *_ in fitted.values())}
    left = [path for path in old if path not in used]
    for path in left:
        if _is_chosen(start, path) and path not in {*fresh, *unfit} and not matches(start.allow_extra, path):
            where = f"{path} {old[path].shape} of {label} is not in the model"
            problems.append(f"{where}: leave it by init_from.allow_extra")
    if not used and not problems:
        problems.append("init_from.include and init_from.exclude leave nothing to load")
    if problems:
        raise ConfigError(problems)
    return Transfer(same, fitted, tuple(fresh), tuple(left))


def _is_chosen(start: InitFromConfig, path: str) -> bool:
    return (not start.include or matches(start.include, path)) and not matches(start.exclude, path)


def _place(rename: tuple[str, ...], path: str) -> str:
    """Returns the path in the source of a path in the new model."""
    for new, _, old in (pair.partition("=") for pair in rename):
        if path == new or path.startswith(new + "/"):
            return old + path[len(new) :]
    return path


def _is_same(old: ParameterSpec, new: ParameterSpec) -> bool:
    return (old.shape, old.axes, old.padding_rows) == (new.shape, new.axes, new.padding_rows)


def _fit(start: InitFromConfig, old: ParameterSpec, new: ParameterSpec) -> tuple[Fit, str] | str:
    """Returns what makes an array of the spec `old` one of `new`, and that in words; only why not if nothing does."""
    if old.axes != new.axes:
        return "its dimensions are others"
    apart = [axis for axis, was, now in zip(old.axes, old.shape, new.shape, strict=True) if was != now]
    if strange := [axis for axis in apart if axis not in ("vocab", "positions", "layers")]:
        return f"they differ in {', '.join(strange)}"
    if "vocab" in old.axes:
        return _fit_vocabulary(old, new)
    if "positions" in old.axes:
        return _fit_positions(old.shape[0], new.shape[0])
    return _fit_layers(start, old.shape[0], new.shape[0])


def _fit_vocabulary(old: ParameterSpec, new: ParameterSpec) -> tuple[Fit, str]:
    """New tokens begin as the mean of all: as likely as an average token, they disturb the others least (Hewitt 2021,
    nlp.stanford.edu/~johnhew/vocab-expansion.html)."""
    was, now = old.shape[0] - old.padding_rows, new.shape[0] - new.padding_rows

    def fit(x: Array) -> Array:
        more = jnp.broadcast_to(jnp.mean(x[:was], axis=0, keepdims=True), (max(0, now - was), *x.shape[1:]))
        rows = jnp.concatenate([x[: min(was, now)], more])
        return jnp.pad(rows, [(0, new.padding_rows)] + [(0, 0)] * (x.ndim - 1))

    grown = f"the rows of {now - was:,} more tokens begin as the mean of the {was:,} old ones"
    return fit, grown if now > was else f"the first {now:,} of {was:,} tokens"


def _fit_positions(was: int, now: int) -> tuple[Fit, str]:
    """Positions beyond the old ones begin as these, over again (Beltagy et al. 2020, arXiv:2004.05150, section 5)."""
    places = np.arange(now) % was
    return lambda x: x[
        places
    ], f"{was:,} positions over again up to {now:,}" if now > was else f"the first {now:,} of {was:,} positions"


def _fit_layers(start: InitFromConfig, was: int, now: int) -> tuple[Fit, str] | str:
    if start.layers == "all" or now > was:
        return "they differ in layers (init_from.layers says which of more layers fewer begin with)"
    chosen = np.arange(now) if start.layers == "first" else np.arange(now) * was // now
    return lambda x: x[chosen], f"{', '.join(map(str, chosen))} of its {was} groups of layers, counted from 0"


def arrays(plan: Transfer, source: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the source's arrays that are loaded as they are, and those that are to be fitted, by their new paths."""
    taken: set[str] = set()

    def once(place: str) -> Any:
        # An array that two parameters begin as is given away by one of them alone.
        array = jnp.array(source[place]) if place in taken else source[place]
        taken.add(place)
        return array

    same = {path: once(place) for path, place in plan.same.items()}
    return same, {path: once(place) for path, (place, *_) in plan.fitted.items()}


def filled(params: Tree, values: Mapping[str, Any]) -> Tree:
    """Returns `params` with the given values at their paths."""

    def chosen(path: Any, leaf: Any) -> Any:
        return values.get(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(chosen, params)

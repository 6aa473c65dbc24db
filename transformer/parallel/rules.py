"""The table of sharding rules of a configuration: ours, changed as `parallel.rules` and options say."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from transformer.config import MESH_AXES, Config, ConfigError, ModelConfig, nearest
from transformer.models.parameters import is_spec
from transformer.parallel.sharding import rules_in_use

Rules = Mapping[str, tuple[str, ...]]

FIXED = {
    "batch": "the batch lies over replica, fsdp and expert, and rows are read by that",
    "length": "lengths lie over context, and attention counts on it",
    "whole": "it is what is split by nothing",
    "layers": "layers lie over stage, and pipelines count on it",
}
"""Names whose rule is no matter of layout alone."""


def make_table(config: Config, rules: Rules) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns `rules` as this configuration changes them, hashable; raises ConfigError with all that is wrong."""
    if problems := list(problems_of_rules(config, rules)):
        raise ConfigError(problems)
    table = dict(rules)
    if config.parallel.sequence_sharding:
        # Between blocks, where `tensor` would hold the same activations on all its devices (Korthikanti et al. 2022,
        # arXiv:2205.05198, section 4.2.2).
        table["residual_length"] = (*rules["length"], "tensor")
    table |= {name: axes for name, axes in map(_parsed, config.parallel.rules)}
    return tuple(table.items())


def problems_of_rules(config: Config, rules: Rules) -> Iterator[str]:
    """Yields a sentence for each mistake in `parallel.rules`."""
    seen: set[str] = set()
    for text in config.parallel.rules:
        label = f"parallel.rules: {text!r}"
        name, axes = _parsed(text)
        if "=" not in text:
            yield f"{label} is not of the form NAME=AXIS,AXIS"
        elif name not in rules:
            yield f"{label}: {name!r} is none of {', '.join(rules)}{nearest(name, tuple(rules))}"
        elif name in FIXED:
            yield f"{label}: {FIXED[name]}"
        elif name in seen:
            yield f"{label}: {name!r} has a rule already"
        seen.add(name)
        for axis in axes:
            if axis not in MESH_AXES:
                yield f"{label}: {axis!r} is none of the axes {', '.join(MESH_AXES)}{nearest(axis, MESH_AXES)}"
        if len(set(axes)) < len(axes):
            yield f"{label}: an axis splits a dimension once"


def _parsed(text: str) -> tuple[str, tuple[str, ...]]:
    name, _, axes = text.partition("=")
    return name.strip(), tuple(axis.strip() for axis in axes.split(",") if axis.strip())


def left_whole(model: ModelConfig, specs: Any, sizes: Mapping[str, int]) -> dict[str, str]:
    """Returns what a rule would split and the mesh does not divide, with the reason: dimensions of parameters, and heads."""
    rules, dims = dict(rules_in_use.value), []
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        label = jax.tree_util.keystr(path, simple=True, separator="/")
        dims += [(f"{label}, {name}", name, dim) for name, dim in zip(spec.axes, spec.shape, strict=True)]
    if any("kv_heads" in spec.axes for spec in jax.tree.leaves(specs, is_leaf=is_spec)):
        # Parameters have the columns of all heads in one dimension, which may divide where heads do not.
        dims.append(("heads of keys and values, in activations", "kv_heads", model.kv_heads))
    found = {}
    for label, name, dim in dims:
        axes = [axis for axis in rules[name] if sizes[axis] > 1]
        if dim % math.prod(sizes[axis] for axis in axes):
            pieces = " x ".join(f"{axis} {sizes[axis]}" for axis in axes)
            found[label] = f"{dim} is not divisible by {pieces}"
    return found

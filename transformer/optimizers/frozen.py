"""Parameters that are not trained: the rules never see them."""

from typing import Any

import jax
import optax

from transformer.config import ConfigError, nearest
from transformer.config.path_patterns import matches, unused
from transformer.models.parameters import Tree, is_spec


def without(patterns: tuple[str, ...], tree: Tree) -> Tree:
    """Returns a tree of parameters, or of something about each, with `optax.MaskedNode` in the place of those that match.

    Such a node has no leaves: neither a gradient nor a moment is made for it.
    """

    def kept(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return optax.MaskedNode() if matches(patterns, name) else leaf

    return jax.tree_util.tree_map_with_path(kept, tree, is_leaf=is_spec)


def freeze(
    optimizer: optax.GradientTransformationExtraArgs, patterns: tuple[str, ...], specs: Tree
) -> optax.GradientTransformationExtraArgs:
    """Returns `optimizer` for parameters of which those that match the patterns are left out.

    Raises ConfigError for patterns that match nothing, and if nothing is left to train.
    """
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if wrong := unused(patterns, paths):
        known = f"they are {', '.join(paths)}"
        raise ConfigError(
            [f"optimizer.frozen = {one!r}: no parameter matches{nearest(one, paths)}; {known}" for one in wrong]
        )
    if all(matches(patterns, path) for path in paths):
        raise ConfigError(f"optimizer.frozen = {patterns}: nothing is left to train")

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return optimizer.update(without(patterns, updates), state, without(patterns, params), **extra)

    return optax.GradientTransformationExtraArgs(lambda params: optimizer.init(without(patterns, params)), update)

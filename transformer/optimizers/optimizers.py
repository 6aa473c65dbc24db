"""Gradient transformations by name. `update(gradients, state, params, rate=learning rate)` gives what is added."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from transformer.config import Config, replace
from transformer.models.parameters import Tree, divide, is_spec, map_specs

Rule = Callable[[Config, Tree], optax.GradientTransformationExtraArgs]


OPTIMIZERS: dict[str, tuple[str, str]] = {
    "adamw": ("transformer.optimizers.adamw", "adamw"),
    "adafactor": ("transformer.optimizers.adafactor", "adafactor"),
    "lion": ("transformer.optimizers.lion", "lion"),
    "sgd": ("transformer.optimizers.sgd", "sgd"),
    "muon": ("transformer.optimizers.muon", "muon"),
    "schedule_free": ("transformer.optimizers.schedule_free", "schedule_free"),
}
"""Module and `Rule` by name, loaded when a run asks for them."""


def make_optimizer(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Returns clipping by the global norm, then the rule that the configuration names, then an average if it wants one.

    Parameters of role `balance` are apart from all this: against the sign of their gradient, they take steps of
    `model.balance_bias_rate` (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), and the norm leaves them out.
    """
    specs = divide(specs, specs)[0]  # what is frozen has no state
    if frozen := config.optimizer.frozen:
        trained = make_optimizer(replace(config, optimizer={"frozen": ()}), trained_part(config, specs))
        return importlib.import_module("transformer.optimizers.frozen").freeze(trained, frozen, specs)
    module, name = OPTIMIZERS[config.optimizer.name]
    rule: Rule = getattr(importlib.import_module(module), name)
    norm = config.optimizer.clip_norm
    # The state has the same form with and without clipping, so that a run may change its mind.
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    weights = map_specs(lambda spec: optax.MaskedNode() if spec.role == "balance" else spec, specs)
    optimizer = optax.chain(clip, rule(config, weights))
    if any(spec.role == "balance" for spec in jax.tree.leaves(specs, is_leaf=is_spec)):
        balance = optax.chain(optax.scale_by_sign(), optax.scale(-config.model.balance_bias_rate))
        labels = map_specs(lambda spec: "balance" if spec.role == "balance" else "weights", specs)
        optimizer = optax.partition({"weights": optimizer, "balance": balance}, labels)
    if not (decay := config.optimizer.ema_decay):
        return optimizer
    average = importlib.import_module("transformer.optimizers.moving_average").moving_average
    return optax.chain(optimizer, average(decay))


def trained_part(config: Config, tree: Tree) -> Tree:
    """Returns a tree of parameters, or of something about each, without those that `optimizer.frozen` names: nodes without
    leaves stand in their places."""
    frozen = config.optimizer.frozen
    return importlib.import_module("transformer.optimizers.frozen").without(frozen, tree) if frozen else tree


def put_back(trained: Any, params: Tree) -> Tree:
    """Returns `trained`, what `trained_part` gave, with the others from `params`."""

    def chosen(new: Any, old: Any) -> Any:
        return old if isinstance(new, optax.MaskedNode) else new

    return jax.tree.map(chosen, trained, params, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def gradient_norm(gradients: Tree, specs: Tree) -> Any:
    """Returns the norm that clipping looks at, that of all parameters but those of role `balance`."""
    leaves = zip(jax.tree.leaves(gradients), jax.tree.leaves(specs, is_leaf=is_spec), strict=True)
    return optax.tree.norm([gradient for gradient, spec in leaves if spec.role != "balance"])

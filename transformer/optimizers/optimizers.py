"""Gradient transformations by name. The step multiplies what they return by minus the learning rate."""

from collections.abc import Callable

import optax

from transformer.config import Config, OptimizerConfig
from transformer.models.parameters import Tree, map_specs


def _adamw(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    decayed = map_specs(lambda spec: spec.role in ("matrix", "embedding", "head"), specs)
    return optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, decayed),
    )


def _sgd(config: OptimizerConfig, specs: Tree) -> optax.GradientTransformation:
    return optax.trace(config.momentum) if config.momentum else optax.identity()


OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Tree], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "sgd": _sgd,
}


def make_optimizer(config: Config, specs: Tree) -> optax.GradientTransformation:
    """Returns clipping by the global norm followed by the optimizer's own rule, learning rate left out."""
    norm = config.optimizer.clip_norm
    # The state has the same form with and without clipping, so that a run may change its mind.
    clip = optax.clip_by_global_norm(norm) if norm else optax.identity()
    return optax.chain(clip, OPTIMIZERS[config.optimizer.name](config.optimizer, specs))

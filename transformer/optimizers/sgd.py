"""Gradient descent."""

import optax

from transformer.config import Config
from transformer.models.parameters import Tree
from transformer.optimizers.descent import descend


def sgd(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Gradient descent, with momentum if there is any, and without weight decay."""
    momentum = config.optimizer.momentum
    return descend(optax.trace(momentum) if momentum else optax.identity(), config, specs, decays=False)

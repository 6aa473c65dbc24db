"""AdamW: steps of one size in every coordinate, and decay beside them."""

import optax

from transformer.config import Config
from transformer.models.parameters import Tree
from transformer.optimizers.descent import descend


def adamw(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Adam (Kingma & Ba 2015, arXiv:1412.6980) with decoupled weight decay."""
    optimizer = config.optimizer
    return descend(optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon), config, specs)

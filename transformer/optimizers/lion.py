"""Lion: steps of one size, in the direction of the sign of a momentum."""

import optax

from transformer.config import Config
from transformer.models.parameters import Tree
from transformer.optimizers.descent import descend


def lion(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Chen et al. 2023 (arXiv:2302.06675), algorithm 2."""
    return descend(optax.scale_by_lion(config.optimizer.beta1, config.optimizer.beta2), config, specs)

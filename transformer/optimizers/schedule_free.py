"""Schedule-free AdamW: an average of the weights in the place of a schedule."""

from typing import Any

import jax
import optax

from transformer.config import Config
from transformer.models.parameters import Tree
from transformer.optimizers.descent import descend


def schedule_free(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Defazio et al. 2024 (arXiv:2405.15682), algorithm 1: gradients are taken between z, which moves, and its average.

    `averaging.evaluated` gives the average. Steps of a larger learning rate weigh more in it, by its square.
    """
    optimizer = config.optimizer
    rms = optax.scale_by_rms(optimizer.beta2, optimizer.epsilon, eps_in_sqrt=False, bias_correction=True)
    base = descend(rms, config, specs)

    def at(rate: Any) -> optax.GradientTransformationExtraArgs:
        return optax.contrib.schedule_free(base, rate, b1=optimizer.beta1)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return at(extra["rate"]).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(at(0.0).init, update)


def average(params: Tree, state: Any) -> Tree:
    """Returns x of algorithm 1, where params = (1 - beta) z + beta x."""

    def of(params: Tree, beta: Any, z: Tree) -> Tree:
        def leaf(y: Any, z: Any) -> Any:
            return y if isinstance(z, optax.MaskedNode) else (y - (1 - beta) * z) / beta

        return jax.tree.map(leaf, params, z)

    layout = jax.tree.map(lambda leaf: leaf.sharding, params)
    return jax.jit(of, out_shardings=layout)(params, state.b1, state.z)

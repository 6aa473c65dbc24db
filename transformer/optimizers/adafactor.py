"""Adafactor: second moments of a matrix kept as one row and one column."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from transformer.config import Config
from transformer.models.parameters import ParameterSpec, Tree
from transformer.optimizers.descent import descend, matrix_dims

CLIP, SMALLEST = 1.0, 1e-3


def adafactor(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Shazeer & Stern 2018 (arXiv:1804.04235), algorithms 4 and 5, with the decay 1 - t^-0.8 and no first moment.

    An update is clipped to a root mean square of 1 and multiplied by that of the parameters (at least 1e-3), so that
    the learning rate is relative. Both are of one layer's, and one expert's, array, however many are stored together, and
    without the rows that only pad a table.
    """

    def relative(updates: Any, params: Any) -> Any:
        def scaled(update: Array, param: Array, spec: ParameterSpec) -> Array:
            size = jnp.maximum(_root_mean_square(param, spec), SMALLEST)
            return update * size / jnp.maximum(1, _root_mean_square(update, spec) / CLIP)

        return jax.tree.map(scaled, updates, params, specs)

    direction = optax.chain(optax.scale_by_factored_rms(), optax.stateless(relative))
    # The parameters' own size falls with the root of the width already.
    return descend(direction, config, specs, lambda spec: 0.5)


def _root_mean_square(x: Array, spec: ParameterSpec) -> Array:
    share = 1 - spec.padding_rows / spec.shape[0]  # the others are zero
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=matrix_dims(spec), keepdims=True) / share)

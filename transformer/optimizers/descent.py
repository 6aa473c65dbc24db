"""What the rules have in common: from a direction to a step, by width, weight decay and learning rate."""

import importlib
import operator
from collections.abc import Callable
from typing import Any

import jax
import optax

from transformer.config import Config
from transformer.models.parameters import ParameterSpec, Tree, map_specs


def matrix_dims(spec: ParameterSpec) -> tuple[int, ...]:
    """Returns the dimensions of one layer's, and one expert's, array in a parameter that holds those of many."""
    return tuple(dim for dim, name in enumerate(spec.axes) if name not in ("layers", "experts"))


def descend(
    direction: optax.GradientTransformation,
    config: Config,
    specs: Tree,
    width_power: Callable[[ParameterSpec], float] = lambda spec: 1.0,
    decays: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Returns the rule that goes against `direction`; its `update` is given the learning rate as `rate`.

    Under muP matrices move the more slowly the wider the model is, by the power `width_power(spec)` of the width: 1 for
    rules whose steps have the same size in every coordinate, like Adam's (Yang et al. 2022, arXiv:2203.03466, table 8;
    embedding, head, biases and norms keep their rate, the logits being divided by the width). Weight decay is decoupled
    (Loshchilov & Hutter 2019, arXiv:1711.05101): it shrinks by rate * weight_decay a step, whatever the width.
    """
    optimizer, ratio = config.optimizer, config.model.width_ratio
    rates = {"matrix": optimizer.matrix_rate, "embedding": optimizer.embedding_rate, "head": optimizer.head_rate}
    factors = map_specs(lambda spec: rates.get(spec.role, optimizer.vector_rate), specs)
    if optimizer.depth_rate != 1:
        depth = importlib.import_module("transformer.optimizers.depth").depth_factors(config, specs)
        factors = jax.tree.map(operator.mul, factors, depth)
    widths = map_specs(lambda spec: ratio ** -width_power(spec) if spec.role == "matrix" else 1.0, specs)
    decayed = map_specs(lambda spec: spec.role in ("matrix", "embedding", "head"), specs)
    parts = [direction]
    if ratio != 1:
        parts.append(_scale(widths))
    if decays:
        parts.append(optax.add_decayed_weights(optimizer.weight_decay, decayed))
    return optax.chain(*parts, _against(factors))


def _scale(factors: Tree) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, factor: factor * u, updates, factors))


def _against(factors: Tree) -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        rate = extra["rate"]
        return jax.tree.map(lambda u, factor: -(factor * rate) * u, updates, factors), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

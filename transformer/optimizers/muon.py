"""Muon: matrices move along the orthogonal matrix nearest to their momentum, everything else by Adam."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from transformer.config import Config
from transformer.models.parameters import ParameterSpec, Tree, map_specs
from transformer.optimizers.descent import descend, matrix_dims
from transformer.parallel.sharding import partition_spec

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
WHOLE = {"layers": ("stage", "replica", "fsdp", "context", "tensor"), "experts": ("expert",), "whole": ()}
"""Layout for the iteration: matrices whole, those of different layers and experts apart."""


def muon(config: Config, specs: Tree) -> optax.GradientTransformationExtraArgs:
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), with Nesterov momentum.

    Matrices of layers, one by one, are orthogonalised; embeddings, head, norms and biases are Adam's. An orthogonal
    [I, O] has a root mean square of 1 / sqrt(max(I, O)): times 0.2 sqrt(max(I, O)) it is as large as Adam's update
    usually is, so that both share learning rate and weight decay (Liu et al. 2025, arXiv:2502.16982, section 2.2).
    """
    optimizer = config.optimizer
    labels = map_specs(lambda spec: "matrices" if is_orthogonalized(spec) else "others", specs)
    matrices = map_specs(lambda spec: spec if is_orthogonalized(spec) else optax.MaskedNode(), specs)
    orthogonal = optax.stateless(lambda updates, _: jax.tree.map(_update, updates, matrices))
    momentum = optax.chain(optax.trace(optimizer.muon_momentum, nesterov=True), orthogonal)
    adam = optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.epsilon)
    direction = optax.partition({"matrices": momentum, "others": adam}, labels)
    # The largest singular value of such an update grows with the root of the width, and under muP it has to stay the
    # same between dimensions that grow alike (Yang et al. 2023, arXiv:2310.17813, condition 1).
    return descend(direction, config, specs, lambda spec: 0.5 if is_orthogonalized(spec) else 1.0)


def is_orthogonalized(spec: ParameterSpec) -> bool:
    """Returns whether a parameter is a matrix, or holds one for each layer or expert in its leading dimensions."""
    dims = matrix_dims(spec)
    return spec.role == "matrix" and len(dims) == 2 and dims[0] == len(spec.shape) - 2


def _update(momentum: Array, spec: ParameterSpec) -> Array:
    axes = (*spec.axes[:-2], "whole", "whole")
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        # One exchange before the iteration, instead of several in each round of it.
        layout = partition_spec(axes, spec.shape, mesh.shape, WHOLE)
        momentum = jax.lax.with_sharding_constraint(momentum, layout)
    return 0.2 * math.sqrt(max(spec.shape[-2:])) * orthogonalize(momentum)


def orthogonalize(x: Float[Array, "... I O"]) -> Float[Array, "... I O"]:
    """Returns U V^T of x = U S V^T, roughly: all singular values end up near 1.

    A Newton-Schulz iteration on all matrices at once. `optax.contrib.scale_by_muon` has the same one, but makes layers
    and experts one dimension first, so that experts on different devices would be gathered in every round.
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonalize(x.mT).mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-8)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x

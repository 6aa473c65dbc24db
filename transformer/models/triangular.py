"""Inverses of many small triangular matrices at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DIRECT = 8
"""Up to so many rows are substituted one after another."""


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "B M C C"]) -> Float[Array, "B M C C"]:
    """Returns (I + `lower`)^-1, `lower` being zero on and above its diagonal.

    The inverses of two halves, and a product with what lies between them, make the whole; the halves of all matrices
    are inverted together. As stable as substitution, and made of matrix products: XLA's own triangular solver takes
    fifty times as long for many small systems on a CPU.
    """
    size = lower.shape[-1]
    if size <= DIRECT:
        return _substitute(lower)
    half = DIRECT
    while 2 * half < size:
        half *= 2
    if size != 2 * half:
        wide = [(0, 0)] * 2 + [(0, 2 * half - size)] * 2
        return unit_lower_inverse(jnp.pad(lower, wide))[..., :size, :size]
    first, second = lower[..., :half, :half], lower[..., half:, half:]
    pair = jnp.stack([first, second], axis=2)
    # Halves are more matrices, and no dimension of their own: XLA's CPU backend crashes on too many dimensions.
    pair = unit_lower_inverse(pair.reshape(len(pair), -1, half, half)).reshape(pair.shape)
    first, second = pair[:, :, 0], pair[:, :, 1]
    between = -(_product(second, _product(lower[..., half:, :half], first)))
    upper = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
    return jnp.concatenate([upper, jnp.concatenate([between, second], axis=-1)], axis=-2)


def _substitute(lower: Array) -> Array:
    unit = jnp.broadcast_to(jnp.eye(lower.shape[-1]), lower.shape)
    rows: list[Array] = []
    for i in range(lower.shape[-1]):
        done = sum((lower[..., i, j, None] * row for j, row in enumerate(rows)), jnp.zeros_like(unit[..., i, :]))
        rows.append(unit[..., i, :] - done)
    return jnp.stack(rows, axis=-2)


def _product(left: Array, right: Array) -> Array:
    # Errors here spread over all later rows; accelerators would otherwise round the factors to fewer bits.
    return jnp.matmul(left, right, precision="highest")


def _forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _backward(inverse: Array, gradient: Array) -> tuple[Array]:
    return (-jnp.tril(_product(inverse.mT, _product(gradient, inverse.mT)), -1),)


unit_lower_inverse.defvjp(_forward, _backward)

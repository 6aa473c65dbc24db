"""Matrices of a frozen base in eight or four bits, by qwix (extra `quantization`; QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

A block of weights in a column shares a scale. Two codes of four bits lie in a byte, those of rows 2 i and 2 i + 1. Weights are
made of the codes where they are multiplied, and again for the gradient: between the products of a layer there are none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from jaxtyping import Array, Float, Num

from transformer.models.parameters import ParameterSpec

KINDS: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"}


def block_length(inputs: int, wanted: int) -> int:
    """Returns the longest block up to the one wanted that divides the inputs of a map."""
    return max(length for length in range(1, min(inputs, wanted) + 1) if inputs % length == 0)


def specs(kernel: ParameterSpec, kind: str, block: int) -> tuple[ParameterSpec, ParameterSpec]:
    """Returns what is kept in the place of a matrix, or of one a layer: codes and scales."""
    *layers, inputs, outputs = kernel.shape
    # A byte holds two rows; a matrix of an odd number has a byte a weight.
    rows, dtype = (inputs // 2, "uint8") if is_packed(inputs, kind) else (inputs, "int8")

    def spec(rows: int, dtype: str) -> ParameterSpec:
        def made(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jnp.zeros(shape, dtype)

        return ParameterSpec((*layers, rows, outputs), kernel.axes, made, "vector", 0, kernel.num_layers, dtype, True)

    return spec(rows, dtype), spec(inputs // block_length(inputs, block), "float32")


def is_packed(inputs: int, kind: str) -> bool:
    return kind != "int8" and inputs % 2 == 0


def quantize(
    kernel: Float[Array, "... I O"], kind: str, block: int
) -> tuple[Num[Array, "... J O"], Float[Array, "... G O"]]:
    """Returns codes and scales, layer by layer so that what it takes meanwhile is that of one."""
    if kernel.ndim > 2:
        return jax.lax.map(lambda layer: quantize(layer, kind, block), kernel)
    length = block_length(kernel.shape[0], block)
    found = qwix.quantize(kernel, KINDS[kind], channelwise_axes=[1], tiled_axes={0: length}, scale_dtype=jnp.float32)
    codes = found.qvalue.astype(jnp.int8)
    if is_packed(kernel.shape[0], kind):
        low, high = (codes[first::2].astype(jnp.uint8) & 15 for first in (0, 1))
        codes = low | (high << 4)
    return codes, found.scale


def matrix(codes: Num[Array, "... J O"], scales: Float[Array, "... G O"], kind: str) -> Float[Array, "... I O"]:
    """Returns the matrices that codes stand for."""
    if codes.ndim > 2:
        return jax.lax.map(lambda layer: matrix(layer[0], layer[1], kind), (codes, scales))
    if codes.dtype == jnp.uint8:
        codes = jnp.stack([codes & 15, codes >> 4], axis=1).reshape(-1, codes.shape[1])
        if kind == "int4":  # back from two's complement
            codes = codes.astype(jnp.int8) - 16 * (codes > 7).astype(jnp.int8)
    stored = codes.astype(jnp.uint8 if kind == "nf4" else jnp.int8)
    return qwix.dequantize(qwix.QArray(stored, scales, qtype=KINDS[kind]))


def _matrix_after(x: Array, codes: Array, scales: Array, kind: str) -> tuple[Array, Array]:
    """Returns `x` and the matrix, which is not made before there is an `x` to be multiplied: else the compiler, to which it
    depends on parameters alone, may make those of all layers at once."""
    x, codes, scales = jax.lax.optimization_barrier((x, codes, scales))
    return x, matrix(codes, scales, kind).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(
    x: Float[Array, "... I"], codes: Num[Array, "J O"], scales: Float[Array, "G O"], kind: str
) -> Float[Array, "... O"]:
    """Returns x W, where codes and scales stand for W; there is no gradient but that of x."""
    x, kernel = _matrix_after(x, codes, scales, kind)
    return x @ kernel


def _forward(x: Array, codes: Array, scales: Array, kind: str) -> tuple[Array, Any]:
    return product(x, codes, scales, kind), (codes, scales)


def _backward(kind: str, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Any, Array]:
    gradient, kernel = _matrix_after(gradient, *kept, kind)
    return gradient @ kernel.T, np.zeros(kept[0].shape, jax.dtypes.float0), jnp.zeros_like(kept[1])


product.defvjp(_forward, _backward)

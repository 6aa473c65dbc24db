"""Matrix products of training with operands of eight bits, through qwix (`model.matrix_products`, extra `quantization`).

What is stored stays as it is: operands are rounded just before their product, each row and each column by a scale of its own,
its largest absolute value; sums are int32 or float32.

- `int8`: the products of the forward pass and of the gradient toward the input. That of the weights, which sums over
  all tokens, stays in the type of the activations, as in SwitchBack (Wortsman et al. 2023, arXiv:2304.13013).
- `fp8`: all three; four bits of exponent for activations and weights, five for gradients (Micikevicius et al. 2022,
  arXiv:2209.05433).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float

FORWARD = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BACKWARD = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}


def _product(left: Array, left_kind: Any, right: Array, right_kind: Any, over: tuple[list[int], list[int]]) -> Array:
    """Returns the product that sums `over` dimensions of each operand; along all others each index has a scale."""

    def rounded(x: Array, kind: Any, summed: list[int]) -> Any:
        others = [axis for axis in range(x.ndim) if axis not in summed]
        return qwix.quantize(x, kind, channelwise_axes=others, scale_dtype=jnp.float32)

    pair = rounded(left, left_kind, over[0]), rounded(right, right_kind, over[1])
    product = qwix.dot_general(*pair, (over, ((), ())), preferred_element_type=jnp.float32)
    return product.astype(left.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def eight_bit_product(x: Float[Array, "... I"], kernel: Float[Array, "I O"], name: str) -> Float[Array, "... O"]:
    """Returns x @ kernel with rounded operands, and has its gradient computed so; `name` is `int8` or `fp8`."""
    return _product(x, FORWARD[name], kernel, FORWARD[name], ([x.ndim - 1], [0]))


def _forward(x: Array, kernel: Array, name: str) -> tuple[Array, Any]:
    return eight_bit_product(x, kernel, name), (x, kernel)


def _backward(name: str, residuals: Any, ahead: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    to_x = _product(ahead, BACKWARD[name], kernel, FORWARD[name], ([x.ndim - 1], [1]))
    tokens = list(range(x.ndim - 1))
    if name == "int8":
        to_kernel = jnp.tensordot(x, ahead, (tokens, tokens))
    else:
        to_kernel = _product(x, FORWARD[name], ahead, BACKWARD[name], (tokens, tokens))
    return to_x, to_kernel.astype(kernel.dtype)


eight_bit_product.defvjp(_forward, _backward)

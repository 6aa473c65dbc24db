"""Scaled dot-product attention, written out: what every faster implementation has to agree with."""

import math
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.models.masks import Mask
from transformer.models.mixers import Bias


@runtime_checkable
class Attend(Protocol):
    """Computes what `dot_product_attention` does."""

    def __call__(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K U"],
        mask: Mask,
        *,
        bias: Bias | None = None,
        scale: float | None = None,
        soft_cap: float = 0.0,
    ) -> Float[Array, "B T N U"]: ...


def dot_product_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
    block: int | None = None,
) -> Float[Array, "B T N U"]:
    """Returns softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, section 3.2.1), the softmax in float32.

    Each key and value head serves N / K query heads (Ainslie et al. 2023, arXiv:2305.13245). `scale` stands for
    1 / sqrt(H); `soft_cap` bends the logits (Gemma 2, arXiv:2408.00118, section 2); `bias` is added to them. A query
    that may see no key gets zero. `block` queries at a time meet only the keys that their columns can see: for a causal
    mask and T much larger than `block`, half the work.
    """
    batch, length, num_heads, head_width = query.shape
    query = query * (1 / math.sqrt(head_width) if scale is None else scale)
    query = query.reshape(batch, length, key.shape[2], -1, head_width)
    # Heads before tokens: the order in which XLA's CPU backend multiplies fastest.
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2)
    outputs, any_visible = [], []
    for start in range(0, length, block or length):
        stop = min(length, start + (block or length))
        columns = mask.columns(start, stop) if block else (0, mask.num_keys)
        seen = mask.queries(start, stop - start).keys(columns[0], columns[1] - columns[0])
        visible = seen.visible()
        keys = slice(*columns)
        logits = _product("bkgth,bksh->bkgts", query[:, :, :, start:stop], key[:, :, keys])
        if soft_cap:
            logits = soft_cap * jnp.tanh(logits / soft_cap)
        if bias is not None:
            values = bias(seen.query.positions, seen.key.positions)
            logits = logits + values.reshape(values.shape[0], key.shape[1], -1, *values.shape[2:])
        logits = jnp.where(visible[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
        outputs.append(_product("bkgts,bksu->bkgtu", weights, value[:, :, keys]).astype(value.dtype))
        any_visible.append(jnp.any(visible, axis=-1))
    output = jnp.concatenate(outputs, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)
    return jnp.where(jnp.concatenate(any_visible, axis=1)[:, :, None, None], output, 0)


def _product(spec: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


ATTENTION: dict[str, Attend] = {
    "reference": dot_product_attention,
    "causal_blocks": partial(dot_product_attention, block=128),
}
"""The implementations by name; each computes what `dot_product_attention` does."""

LONGEST_IN_BLOCKS = 4096
"""Tokens up to which `auto` takes blocks: each block is compiled by itself."""


def attend(name: str, query: Array, key: Array, value: Array, mask: Mask, **options: Any) -> Array:
    """Computes attention by the implementation `name`; `auto` takes blocks on a CPU.

    Only where no query sees a later column do blocks leave something out; elsewhere, in a cache or an encoder, everything is
    computed at once.
    """
    if name == "auto":
        is_short = query.shape[1] <= LONGEST_IN_BLOCKS
        name = "causal_blocks" if jax.default_backend() == "cpu" and is_short else "reference"
    return ATTENTION[name if mask.is_lower_triangular else "reference"](query, key, value, mask, **options)

"""Scaled dot-product attention, written out: what every faster implementation has to agree with."""

import importlib
import logging
import math
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from transformer.models.layers import auto_on
from transformer.models.masks import Mask
from transformer.models.positions import Bias


@runtime_checkable
class Attend(Protocol):
    """Computes what `dot_product_attention` does, or raises NotImplementedError with the reason why it cannot."""

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


def causal_blocks(query: Any, key: Any, value: Any, mask: Mask, block: int = 128, **options: Any) -> Array:
    """Leaves out what lies above the diagonal, `block` queries at a time; compiles once for each of them."""
    if not mask.is_lower_triangular:
        raise NotImplementedError("it computes causal attention over a batch's own tokens alone")
    if query.shape[1] > 32 * block:
        raise NotImplementedError(f"it is for up to {32 * block} tokens, and this is {query.shape[1]}")
    return dot_product_attention(query, key, value, mask, block=block, **options)


ATTENTION: dict[str, Attend | str] = {
    "reference": dot_product_attention,
    "causal_blocks": causal_blocks,
    "blockwise": "transformer.models.blockwise",
    "cudnn": "transformer.models.cudnn",
    "splash": "transformer.models.splash",
    "tokamax": "transformer.models.tokamax",
}
"""The implementations by name; those in modules of their own, each with a function `attend`, are loaded when asked for."""

PREFERRED = {
    "auto_cpu": ("causal_blocks", "reference"),
    "auto_gpu": ("cudnn", "reference"),
    "auto_tpu": ("splash", "reference"),
}
"""What `auto` tries on each platform, in order; where all of [T, S] would be too large, `blockwise` goes before `reference`."""

LARGEST_SQUARE = 2**22
"""Elements of [T, S] from which on `auto` no longer holds them all."""


def attention_named(name: str) -> Attend:
    """Returns an implementation of attention."""
    found = ATTENTION[name]
    return importlib.import_module(found).attend if isinstance(found, str) else found


def attend(name: str, query: Array, key: Array, value: Array, mask: Mask, **options: Any) -> Array:
    """Computes attention by the implementation `name`, or by the first of an `auto` that can.

    Raises ValueError if an implementation that was asked for by name cannot compute this exactly; an `auto` that
    passes one over says so, once.
    """
    if name == "auto":
        name = auto_on(jax.default_backend())
    if name not in PREFERRED:
        try:
            return attention_named(name)(query, key, value, mask, **options)
        except NotImplementedError as error:
            raise ValueError(f"model.attention_implementation = {name!r}: {error}") from error
    candidates = PREFERRED[name]
    if query.shape[1] * key.shape[1] > LARGEST_SQUARE:
        candidates = (*candidates[:-1], "blockwise", candidates[-1])
    for candidate in candidates:
        try:
            output = attention_named(candidate)(query, key, value, mask, **options)
        except NotImplementedError as error:
            # A cache's columns are never in step with the queries; nothing better is to be had for it.
            if mask.aligned:
                _say_once(f"attention: not by {candidate}, for {error}")
        else:
            return output
    raise AssertionError("the last of the candidates computes everything")


@cache
def _say_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)

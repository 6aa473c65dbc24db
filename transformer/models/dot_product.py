"""Scaled dot-product attention, written out: what every faster implementation has to agree with; and the choice among them."""

import importlib
import logging
import math
from functools import cache
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.config import ConfigError
from transformer.config.implementations import IMPLEMENTATIONS, Asked
from transformer.models.masks import Mask
from transformer.models.mixers import Bias
from transformer.parallel.parts import num_parts

LOWEST = float(np.finfo(np.float32).min)
"""Logit of a key that is not seen."""

LONGEST_AT_ONCE = 1024
"""Tokens, of queries and keys alike, beyond which `auto` takes `blockwise` where it does not take a kernel.

The products of all pairs would be most of the memory, and unrolled blocks would take long to compile and be no faster.
"""

LONGEST_DENSE_MASK = 8192
"""Tokens up to which `auto` writes out a mask for cuDNN."""


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
) -> Float[Array, "B T N U"]:
    """Returns softmax(q k^T / sqrt(H)) v (Vaswani et al. 2017, section 3.2.1), the softmax in float32.

    Each key and value head serves N / K query heads (Ainslie et al. 2023, arXiv:2305.13245). `scale` stands for
    1 / sqrt(H); `soft_cap` bends the logits (Gemma 2, arXiv:2408.00118, section 2); `bias` is added to them. A query
    that may see no key gets zero.
    """
    batch, length, num_heads, head_width = query.shape
    query = query * (1 / math.sqrt(head_width) if scale is None else scale)
    query = query.reshape(batch, length, key.shape[2], -1, head_width)
    # Heads before tokens: the order in which XLA's CPU backend multiplies fastest.
    query, key, value = query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2), value.swapaxes(1, 2)
    visible = mask.visible()
    logits = bend(product("bkgth,bksh->bkgts", query, key), mask, bias, soft_cap)
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], logits, LOWEST), axis=-1).astype(value.dtype)
    output = product("bkgts,bksu->bkgtu", weights, value).astype(value.dtype)
    output = output.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, -1)
    return jnp.where(jnp.any(visible, axis=-1)[:, :, None, None], output, 0)


def bend(
    logits: Float[Array, "B K G T S"], mask: Mask, bias: Bias | None, soft_cap: float
) -> Float[Array, "B K G T S"]:
    """Returns the products of queries and keys with the soft cap and the bias of their positions."""
    if soft_cap:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if bias is None:
        return logits
    values = bias(mask.query.positions, mask.key.positions)
    return logits + values.reshape(values.shape[0], *logits.shape[1:])


def product(spec: str, left: Array, right: Array) -> Float[Array, "..."]:
    """Returns `einsum` with its sums in float32."""
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)


def attend(name: str, query: Array, key: Array, value: Array, mask: Mask, split: str = "ring", **options: Any) -> Array:
    """Computes attention by the implementation `name` of `config.implementations`, or by the one that `auto` chooses.

    Where devices hold parts of the lengths, they exchange them as `split` says. Raises ConfigError where an
    implementation that was named cannot compute exactly what is asked.
    """
    if num_parts(query.shape[1], key.shape[1]) > 1:
        method = importlib.import_module(f"transformer.models.{split}")
        return method.attend(name, query, key, value, mask, **options)
    asked = what_is_asked(query, value, mask, **options)
    if name == "auto":
        name = _choose(asked, mask)
    else:
        for _, problem in IMPLEMENTATIONS[name].refusals(asked):
            raise ConfigError(f"model.attention_implementation = {name!r} {problem}")
    implementation = IMPLEMENTATIONS[name]
    function: Attend = getattr(importlib.import_module(implementation.module), implementation.function)
    return function(query, key, value, mask, **options)


def what_is_asked(
    query: Array, value: Array, mask: Mask, bias: Bias | None = None, soft_cap: float = 0.0, **_: Any
) -> Asked:
    """Returns what an implementation has to compute, and where."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    platform = "gpu" if platform == "cuda" else platform
    widths = (query.shape[3], value.shape[3])
    return Asked(kinds(mask), widths, str(query.dtype), bias is not None, bool(soft_cap), platform)


def kinds(mask: Mask) -> tuple[str, ...]:
    """Returns what is known of a mask before any data, in the words of `config.implementations.MASKS`."""
    found = ("causal" if mask.causal else "bidirectional",)
    found += () if mask.key.prefix is None else ("prefix",)
    found += () if mask.sparsity is None else mask.sparsity.kinds
    return found if mask.aligned else (*found, "unaligned")


def _choose(asked: Asked, mask: Mask) -> str:
    """Returns the name of the implementation that suits the platform, the mask and its size."""
    is_long = mask.num_queries * mask.num_keys > LONGEST_AT_ONCE**2
    plain = "blockwise" if is_long else "reference"
    if asked.platform == "cpu":
        # Without a causal mask there is nothing that blocks of queries could leave out.
        suits = mask.is_lower_triangular and not is_long and not list(IMPLEMENTATIONS["causal_blocks"].refusals(asked))
        return "causal_blocks" if suits else plain
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(str(asked.platform))
    if kernel is None:
        return plain
    problems = [problem for _, problem in IMPLEMENTATIONS[kernel].refusals(asked)]
    if kernel == "cudnn" and max(mask.num_queries, mask.num_keys) > LONGEST_DENSE_MASK:
        problems.append(f"needs the mask in full, here of {mask.num_queries:,} by {mask.num_keys:,} tokens a row")
    if not problems:
        return kernel
    _tell(f"attention is computed by {plain}: {kernel} {problems[0]}")
    return plain


@cache
def _tell(message: str) -> None:
    logging.getLogger(__name__).warning(message)

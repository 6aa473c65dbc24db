"""Attention by kernels of other libraries: splash attention on a TPU, cuDNN and tokamax on a GPU.

Each computes exactly what `dot_product_attention` does, of what `config.implementations` says that it takes.
"""

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from transformer.config import ConfigError
from transformer.models.masks import Mask
from transformer.models.mixers import Bias
from transformer.parallel.parts import layout_of, on_parts

LANES = 128
"""Splash attention takes lengths that are multiples of this."""


def splash(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B T N U"]:
    """Pallas' block-sparse flash attention for TPUs, which knows segments; `interpret` runs it elsewhere, slowly."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as columns

    assert bias is None and mask.aligned and mask.key.prefix is None, "refused"
    length = query.shape[1]
    missing = -length % LANES
    reach = None if mask.sparsity is None else mask.sparsity.reach
    shape = (length + missing, length + missing)
    # A segment's columns lie side by side, so that distances between columns are those between positions.
    window = columns.LocalMask(shape, (reach, 0 if mask.causal else reach), 0)
    window = window if mask.causal or reach is not None else columns.FullMask(shape)
    size = next(size for size in (512, 256, LANES) if (length + missing) % size == 0)
    sizes = splash_kernel.BlockSizes(size, size, None, size, size, None, size, size)

    def compute(query: Array, key: Array, value: Array, mask: Mask) -> Array:
        kernel = splash_kernel.make_splash_mha(
            columns.MultiHeadMask([window] * query.shape[2]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=soft_cap or None,
            interpret=interpret,
        )
        # Padding sees padding, in the kernel: no row may be without keys.
        segments = jnp.pad(mask.query.segment_ids, ((0, 0), (0, missing)))
        heads = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2) for x in (query, key, value))
        output: Any = jax.vmap(kernel)(*heads, splash_kernel.SegmentIds(segments, segments))
        output = output.swapaxes(1, 2)[:, :length]
        return jnp.where(mask.query.segment_ids[:, :, None, None] != 0, output, 0)

    query = query * (query.shape[3] ** -0.5 if scale is None else scale)
    return _on_each_device(compute, query, key, value, mask)


def cudnn(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """cuDNN's flash attention. It gets [B, 1, T, S] of mask, one for all heads: segments are known to it in no other way."""
    assert bias is None and not soft_cap, "refused"
    function = partial(jax.nn.dot_product_attention, scale=scale, implementation="cudnn")
    return _on_each_device(partial(_with_mask, function), query, key, value, mask)


def tokamax(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    soft_cap: float = 0.0,
) -> Float[Array, "B T N H"]:
    """tokamax's flash attention in Triton, for GPUs since Ampere; the package is optional. Raises ConfigError without it."""
    assert bias is None and not soft_cap, "refused"
    try:
        package = importlib.import_module("tokamax")
    except ImportError as error:
        name = "model.attention_implementation = 'tokamax'"
        raise ConfigError(f"{name} needs the package tokamax (pip install tokamax)") from error
    from absl import flags

    # It would look for its own options among ours, and refuse the rest of the command line.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    function = partial(package.dot_product_attention, scale=scale, implementation="triton")
    return _on_each_device(partial(_with_mask, function), query, key, value, mask)


def _with_mask(function: Callable[..., Array], query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Calls what has the arguments of `jax.nn.dot_product_attention`."""
    visible = mask.visible()
    reach = None if mask.sparsity is None else mask.sparsity.reach
    is_causal = mask.is_lower_triangular
    length, odd = query.shape[1], [x.shape[1] % 2 for x in (query, key)]
    # cuDNN's gradient under a mask is of even lengths alone.
    query, key, value = (
        jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
        for x, more in zip((query, key, value), (*odd, odd[1]), strict=True)
    )
    output = function(
        query,
        key,
        value,
        mask=jnp.pad(visible, ((0, 0), (0, odd[0]), (0, odd[1])))[:, None],
        # Both follow from the mask; they tell the kernel which blocks to leave out.
        is_causal=is_causal,
        local_window_size=(reach, 0) if is_causal and reach is not None else None,
    )
    return jnp.where(jnp.any(visible, axis=2)[:, :, None, None], output[:, :length], 0)


def _on_each_device(compute: Callable[..., Array], query: Array, key: Array, value: Array, mask: Mask) -> Array:
    """Runs a kernel on each device's rows and heads: the compiler cannot split it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual:
        return compute(query, key, value, mask)
    layout = layout_of(query)
    rows, heads = PartitionSpec(layout.batch), PartitionSpec(layout.batch, None, layout.heads)  # of whole texts
    # Each device needs keys and values of its own.
    key, value = (layout.repeated(x) for x in (key, value))
    return on_parts(compute, (heads, heads, heads, rows), heads)(query, key, value, mask)

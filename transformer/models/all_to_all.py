"""Attention of texts that are split over devices: these swap parts of lengths for heads, and back (DeepSpeed Ulysses, Jacobs
et al. 2023, arXiv:2309.14509). In between, a device has whole texts for its heads, and any implementation will do."""

from typing import Any

import jax
from jaxtyping import Array, Float

from transformer.config import ConfigError
from transformer.models.dot_product import attend as attend_whole
from transformer.models.masks import Mask
from transformer.models.mixers import Bias
from transformer.parallel.parts import AXIS, Layout, layout_of, on_parts


def attend(
    name: str,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K U"],
    mask: Mask,
    *,
    bias: Bias | None = None,
    **options: Any,
) -> Float[Array, "B T N U"]:
    """Computes attention by the implementation `name`; raises ConfigError for heads that the devices do not divide.

    Devices that share parts of a text share heads after those of `tensor` do. Keys and values with fewer heads than
    devices are repeated.
    """
    split = layout_of(query)
    whole = Layout(split.batch, (*split.heads, AXIS))
    if query.shape[2] % whole.num_ways:
        axes = " x ".join(f"parallel.{axis}" for axis in whole.heads)
        raise ConfigError(f"model.context_attention = 'all_to_all': {query.shape[2]} heads do not divide by {axes}")
    key, value = (whole.repeated(x) for x in (key, value))

    tables, structure = jax.tree.flatten(bias)

    def part(query: Array, key: Array, value: Array, mask: Mask, tables: list[Array]) -> Array:
        query, key, value = (jax.lax.all_to_all(x, AXIS, 2, 1, tiled=True) for x in (query, key, value))
        mask = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), mask)
        bias = jax.tree.unflatten(structure, tables)
        output = attend_whole(name, query, key, value, mask, bias=bias, **options)
        return jax.lax.all_to_all(output, AXIS, 1, 2, tiled=True)

    arrays = split.activations
    specs = (arrays, arrays, arrays, split.tokens, [whole.per_head(table) for table in tables])
    return on_parts(part, specs, arrays)(query, key, value, mask, tables)

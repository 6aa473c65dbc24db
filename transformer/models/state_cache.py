"""What a layer with a state remembers."""

from typing import Any

from jaxtyping import Array, Int

from transformer.config import ModelConfig
from transformer.models.cache import Cache, CacheSpec, read, write
from transformer.models.mixers import Context
from transformer.models.spans import Spans, spans_in


def resume(context: Context, cache: Cache | None, layer: Int[Array, ""] | int) -> tuple[Spans, dict[str, Array]]:
    """Returns the spans of the new tokens, and what one layer remembers from before them; nothing without a cache."""
    held = {} if cache is None else {name: read(array, layer) for name, array in cache.items()}
    return spans_in(context), held


def remember(cache: Cache | None, layer: Int[Array, ""] | int, **values: Any) -> Cache | None:
    """Returns the cache with one layer's new values, each of the name under which `resume` gave the old one."""
    if cache is None:
        return None
    return {name: write(cache[name], layer, value) for name, value in values.items()}


def state_specs(config: ModelConfig, batch_size: int, key_width: int, value_width: int) -> dict[str, CacheSpec]:
    """Returns the state of each head."""
    shape = (batch_size, config.num_heads, key_width, value_width)
    return {"state": CacheSpec(shape, ("batch", "heads", "state", "head_width"))}

"""Causal convolution over the last few tokens, channel by channel, that knows segments, padding and a cache."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig
from transformer.models.cache import CacheSpec
from transformer.models.layers import Linear
from transformer.models.parameters import parameter, zeros
from transformer.models.spans import Spans, own_part
from transformer.parallel.parts import AXIS, num_parts, on_parts
from transformer.parallel.parts import before as before_part
from transformer.parallel.sharding import partition_spec

Places = tuple[Int[Array, "B S W"], Int[Array, "B S W"], Int[Array, "B U"]]
"""Columns of the tokens of one span that stand 0, 1, ... tokens before each and after each, and of the row's last tokens,
the earliest first; -1 where there is none. Columns count from the first of the inputs that were remembered."""


class ShortConvolution(nnx.Module):
    """y_t = sum over w of kernel_w x_{t-w}, x_{t-w} being the w-th token before t of the same span; zero for padding."""

    def __init__(self, config: ModelConfig, channels: int, axis: str):
        self.config, self.channels, self.axis = config, channels, axis
        bound = 1 / math.sqrt(config.convolution_width)

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        self.kernel = parameter((config.convolution_width, channels), ("taps", axis), uniform, "vector")
        self.bias = parameter((channels,), (axis,), zeros, "bias") if config.biases else None

    def __call__(
        self, x: Float[Array, "B T E"], spans: Spans, places: Places, before: Float[Array, "B U E"] | None = None
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B U E"] | None]:
        """Returns the output and, given the U = width - 1 inputs before these, those before the next."""
        if before is None and num_parts(x.shape[1]) > 1:
            output = self._over_parts(x, spans, places)
            return self._biased(output, spans), None
        source, target, last = places
        inputs = x if before is None else jnp.concatenate([before.astype(x.dtype), x], axis=1)
        output = _convolve(inputs, self.kernel[...].astype(x.dtype), source, target)[:, -x.shape[1] :]
        return self._biased(output, spans), None if before is None else _gather(inputs, last)

    def _biased(self, output: Float[Array, "B T E"], spans: Spans) -> Float[Array, "B T E"]:
        if self.bias is None:
            return output
        return jnp.where(spans.is_token[:, :, None], output + self.bias[...].astype(output.dtype), 0)

    def _over_parts(self, x: Float[Array, "B T E"], spans: Spans, places: Places) -> Float[Array, "B T E"]:
        """Returns the convolution where devices have parts of texts: each is handed the inputs before its own."""
        spec = partition_spec(("batch", "length", self.axis), x.shape, jax.sharding.get_abstract_mesh().shape)
        rows = PartitionSpec(*spec[:2])
        run = on_parts(_convolve_part, (spec, PartitionSpec(None, spec[2]), rows, rows), spec)
        return run(x, self.kernel[...].astype(x.dtype), spans, places)

    def cache_spec(self, batch_size: int) -> CacheSpec:
        """Returns the inputs that the next token needs."""
        shape = (batch_size, self.config.convolution_width - 1, self.channels)
        return CacheSpec(shape, ("batch", "taps", self.axis), self.config.compute_dtype)


class ConvolvedLinear(nnx.Module):
    """A linear map, a short convolution of what it gives, and silu."""

    def __init__(self, config: ModelConfig, channels: int, axis: str):
        self.linear = Linear(config, (config.width, channels), ("embed", axis))
        self.convolution = ShortConvolution(config, channels, axis)

    def __call__(
        self, x: Float[Array, "B T D"], spans: Spans, places: Places, before: Float[Array, "B U E"] | None
    ) -> tuple[Float[Array, "B T E"], Float[Array, "B U E"] | None]:
        y, tail = self.convolution(self.linear(x), spans, places, before)
        return jax.nn.silu(y), tail


PARTS = ("query", "key", "value")


def convolve(
    modules: tuple[ConvolvedLinear, ...], x: Float[Array, "B T D"], spans: Spans, held: dict[str, Array]
) -> tuple[list[Array], dict[str, Any]]:
    """Returns queries, keys and values, and what a cache keeps of each, under the names of `tail_specs`."""
    width = modules[0].convolution.config.convolution_width
    if not held and num_parts(x.shape[1]) > 1:
        (rows,) = partition_spec(("batch",), x.shape[:1], jax.sharding.get_abstract_mesh().shape)
        tokens = PartitionSpec(rows, AXIS)
        places = on_parts(lambda spans: neighbours(own_part(spans), width, width - 1), tokens, tokens)(spans)
    else:
        places = neighbours(spans, width, width - 1 if held else 0)
    outputs = [module(x, spans, places, held.get(f"{name}_tail")) for name, module in zip(PARTS, modules, strict=True)]
    return [y for y, _ in outputs], {f"{name}_tail": tail for name, (_, tail) in zip(PARTS, outputs, strict=True)}


def tail_specs(modules: tuple[ConvolvedLinear, ...], batch_size: int) -> dict[str, CacheSpec]:
    """Returns the inputs of each convolution that the next token needs."""
    return {f"{name}_tail": m.convolution.cache_spec(batch_size) for name, m in zip(PARTS, modules, strict=True)}


def neighbours(spans: Spans, width: int, held: int) -> Places:
    """Returns where the tokens of a convolution of `width` taps stand, after `held` inputs of the span that goes on."""
    wide = ((0, 0), (held, 0))
    is_token, number = jnp.pad(spans.is_token, wide, constant_values=True), jnp.pad(spans.number, wide)
    columns = jnp.argsort(~is_token, axis=1, stable=True)  # of the tokens, in order; of padding behind them
    rank = jnp.cumsum(is_token, axis=1) - 1
    count = rank[:, -1:] + 1

    def tokens(ranks: Int[Array, "B I"], span: Int[Array, "B J"]) -> Int[Array, "B I"]:
        found = jnp.take_along_axis(columns, jnp.clip(ranks, 0, columns.shape[1] - 1), axis=1)
        exists = (ranks >= 0) & (ranks < count) & (jnp.take_along_axis(number, found, axis=1) == span)
        return jnp.where(exists, found, -1)

    distances = jnp.concatenate([-jnp.arange(width), jnp.arange(width)])
    near = (rank[:, :, None] + distances).reshape(len(rank), -1)
    places = tokens(near, jnp.repeat(number, 2 * width, axis=1)).reshape(*rank.shape, -1)
    source, target = jnp.split(jnp.where(is_token[:, :, None], places, -1), 2, axis=2)
    return source, target, tokens(count - held + jnp.arange(held), number[:, -1:])


def _gather(x: Float[Array, "B S E"], places: Int[Array, "B *I"]) -> Float[Array, "B *I E"]:
    flat = places.reshape(len(x), -1, 1)
    taken = jnp.where(flat < 0, 0, jnp.take_along_axis(x, jnp.maximum(flat, 0), axis=1))
    return taken.reshape(*places.shape, x.shape[-1])


def _convolve_part(x: Array, kernel: Array, spans: Spans, places: Places) -> Array:
    """Convolves a device's part, the inputs of the last tokens before it being those of the devices that have them."""
    (source, target, last), held = places, len(kernel) - 1
    number = own_part(spans).number
    count = jnp.minimum(held, jnp.sum(spans.is_token & (number == number[:, -1:]), axis=1, keepdims=True))

    def compose(later: Any, earlier: Any) -> Any:
        """Joins the last inputs of two parts; of fewer than there is room for, the first are zero."""
        (tail, count, goes_on), (earlier_tail, earlier_count, earlier_goes_on) = later, earlier
        column = jnp.arange(held) + count
        joined = tail + _gather(earlier_tail, jnp.where(goes_on & (column < held), column, -1))
        return joined, jnp.minimum(held, count + goes_on * earlier_count), goes_on & earlier_goes_on

    nothing = jnp.zeros((len(x), held, x.shape[2]), x.dtype)
    tail = _gather(jnp.concatenate([nothing, x], axis=1), last)
    tail, _, _ = before_part((tail, count, number[:, -1:] == 0), compose)
    return _convolve(jnp.concatenate([tail, x], axis=1), kernel, source, target)[:, held:]


@jax.custom_vjp
def _convolve(
    x: Float[Array, "B S E"], kernel: Float[Array, "W E"], source: Int[Array, "B S W"], target: Int[Array, "B S W"]
) -> Float[Array, "B S E"]:
    """Adds up the taps; the gradient goes the inverse way, since adding it up by index is slow, and keeps no tap."""
    return jnp.sum(_gather(x, source) * kernel, axis=2)


def _forward(x: Array, kernel: Array, source: Array, target: Array) -> tuple[Array, tuple[Array, ...]]:
    return _convolve(x, kernel, source, target), (x, kernel, source, target)


def _backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Any, ...]:
    x, kernel, source, target = kept
    slope = jnp.sum(gradient[:, :, None] * _gather(x, source), axis=(0, 1))
    none = np.zeros(source.shape, jax.dtypes.float0)
    return _convolve(gradient, kernel, target, source), slope, none, none


_convolve.defvjp(_forward, _backward)

"""The short convolution against a loop over tokens: segments, padding, a cache, and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import PREVIOUS, assert_close, random_segments

from transformer.config import ModelConfig
from transformer.models.masks import Tokens
from transformer.models.mixers import Context
from transformer.models.parameters import bind
from transformer.models.short_convolution import ShortConvolution, neighbours
from transformer.models.spans import spans_in, spans_of

LENGTH, CHANNELS = 23, 3


def reference(kernel: np.ndarray, x: np.ndarray, before: np.ndarray, segments: np.ndarray, ahead: np.ndarray) -> Any:
    """Returns output, tail, and gradients of kernel and x."""
    output, gradients = np.zeros_like(x), (np.zeros_like(kernel), np.zeros_like(x))
    tails = []
    for row in range(len(x)):
        known: list[tuple[int, np.ndarray]] = [(-1, value) for value in before[row]]
        segment = PREVIOUS
        for t in np.flatnonzero(segments[row]).tolist():
            known = known if segments[row, t] == segment else []
            segment = segments[row, t]
            known.append((t, x[row, t]))
            for weights, slope, (s, value) in zip(kernel, gradients[0], reversed(known), strict=False):
                output[row, t] += weights * value
                slope += ahead[row, t] * value
                if s >= 0:
                    gradients[1][row, s] += ahead[row, t] * weights
        values = [np.zeros(CHANNELS)] * len(kernel) + [value for _, value in known]
        tails.append(values[len(values) - len(kernel) + 1 :])
    return output, np.array(tails).reshape(before.shape), gradients


@pytest.mark.parametrize("width", [1, 4])
def test_convolution_is_the_loop_and_its_gradient(width):
    rng = np.random.default_rng(width)
    kernel, before = rng.standard_normal((width, CHANNELS)), rng.standard_normal((3, width - 1, CHANNELS))
    x, ahead = rng.standard_normal((2, 3, LENGTH, CHANNELS))
    segments = random_segments(LENGTH)
    module = ShortConvolution(ModelConfig(convolution_width=width), CHANNELS, "heads")

    def differentiated(kernel: Any, x: Any, before: Any, ahead: Any, segments: Any) -> Any:
        spans = spans_of(segments, jnp.full(len(segments), PREVIOUS, jnp.int32))
        places = neighbours(spans, width, width - 1)

        def convolve(kernel: Any, x: Any) -> Any:
            return bind(module, {"kernel": kernel})(x, spans, places, before)

        output, backward, tail = jax.vjp(convolve, kernel, x, has_aux=True)
        return output, tail, backward(ahead)

    arguments = (jnp.asarray(y, jnp.float32) for y in (kernel, x, before, ahead))
    actual = jax.jit(differentiated)(*arguments, segments)
    assert_close(actual, reference(kernel, x, before, segments, ahead))


def test_pieces_with_a_cache_give_the_whole():
    rng = np.random.default_rng(0)
    segments = jnp.asarray(random_segments(LENGTH))
    x = jnp.asarray(rng.standard_normal((3, LENGTH, CHANNELS)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((4, CHANNELS)), jnp.float32)
    module = bind(ShortConvolution(ModelConfig(), CHANNELS, "heads"), {"kernel": kernel})

    @jax.jit
    def run(x: Any, new: Tokens, columns: Tokens, start: Any, before: Any) -> Any:
        spans = spans_in(Context(new, columns, start))
        return module(x, spans, neighbours(spans, 4, 3), before)

    spans = spans_of(segments)
    expected, _ = module(x, spans, neighbours(spans, 4, 0))
    columns = Tokens(segments * 0, segments)
    tail, pieces = jnp.zeros((3, 3, CHANNELS)), []
    for start, stop in [(0, 2), (2, 9), *((t, t + 1) for t in range(9, 16)), (16, 23)]:
        new = jax.tree.map(lambda array, some=slice(start, stop): array[:, some], columns)
        output, tail = run(x[:, start:stop], new, columns, start, tail)
        pieces.append(output)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), expected, rtol=1e-6, atol=1e-6)

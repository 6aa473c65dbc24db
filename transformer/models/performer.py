"""Attention by random features that are positive and orthogonal: FAVOR+ (Choromanski et al. 2020, arXiv:2009.14794)."""

import dataclasses
import math
from functools import cache as memoize
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.models.attention import attention_scale
from transformer.models.cache import Cache, CacheSpec
from transformer.models.linear_attention import LinearAttention, with_ones
from transformer.models.linear_recurrence import mix
from transformer.models.mixers import Context
from transformer.models.spans import Spans, own_part
from transformer.models.state_cache import remember, resume, state_specs
from transformer.parallel.parts import before as before_part
from transformer.parallel.parts import layout_of, num_parts, on_parts

EPSILON = 1e-6
"""Least feature of a key, relative to the largest one before it: no query finds nothing."""
NOTHING = -1e30
"""Logarithm of a feature of a key that is not there; finite, so that differences are no NaN."""


@memoize
def projections(num_heads: int, num_features: int, width: int) -> Float[np.ndarray, "N M H"]:
    """Returns the directions of each head's features: Gaussian, and orthogonal in groups of `width`.

    Constants, which belong to the model like its equations: no checkpoint holds them. All layers share them. The old
    generator of NumPy is the one whose numbers never change.
    """
    rng = np.random.RandomState(0)
    groups = -(-num_features // width)
    square, upper = np.linalg.qr(rng.standard_normal((num_heads, groups, width, width)))
    signs = np.sign(np.diagonal(upper, axis1=-2, axis2=-1))
    rows = np.swapaxes(square * signs[..., None, :], -1, -2).reshape(num_heads, groups * width, width)
    norms = np.linalg.norm(rng.standard_normal(rows.shape), axis=-1, keepdims=True)
    return (rows * norms)[:, :num_features].astype(np.float32)


class Performer(LinearAttention):
    """Softmax attention, its weights exp(q k) being estimated by phi(q) phi(k), phi_m(x) = exp(w_m x - |x|^2 / 2)."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        query, key, value = self.heads(x)
        query, key = self._exponents(query), self._exponents(key, is_key=True)
        # A factor of a query's features cancels in the quotient.
        query, value = jnp.exp(query - jax.lax.stop_gradient(jnp.max(query, -1, keepdims=True))), with_ones(value)
        spans, held = resume(context, cache, layer)
        key, decay, peak = _relative(key, spans, held.get("peak"))
        summed, state = mix(config, query, key, value, decay, spans, held.get("state"))
        # Nothing but padding sees nothing.
        output = summed[..., :-1] / jnp.where(spans.is_token[:, :, None, None], summed[..., -1:], 1.0)
        update = self.output(output.astype(x.dtype).reshape(*x.shape[:2], -1))
        return update, remember(cache, layer, state=state, peak=peak[:, -1])

    def _exponents(self, x: Float[Array, "B T N H"], is_key: bool = False) -> Float[Array, "B T N M"]:
        """Returns the logarithms of the features, of a query up to a number of its own."""
        config = self.config
        directions = projections(config.num_heads, config.num_features, config.state_dim)
        scale = attention_scale(dataclasses.replace(config, head_width=config.state_dim))
        x = math.sqrt(scale) * x.astype(jnp.float32)
        products = jnp.einsum("btnh,nmh->btnm", x, directions, precision="highest")
        return products - jnp.sum(jnp.square(x), axis=-1, keepdims=True) / 2 if is_key else products

    def cache_specs(self, batch_size: int, length: int) -> dict[str, CacheSpec]:
        config = self.config
        peak = CacheSpec((batch_size, config.num_heads), ("batch", "heads"))
        return state_specs(config, batch_size, config.num_features, config.head_dim + 1) | {"peak": peak}


def _relative(
    exponents: Float[Array, "B T N M"], spans: Spans, before: Float[Array, "B N"] | None
) -> tuple[Float[Array, "B T N M"], Float[Array, "B T N"], Float[Array, "B T N"]]:
    """Returns features of keys relative to the largest one up to each token, the log-decays that go with it, and its
    logarithm.

    `before` is the largest one before these tokens; None: there are none. The state is kept relative to the largest feature that it has seen, and shrinks when a larger one comes: nothing
    overflows, no token knows of later ones, and one token at a time gives what all at once do.
    """
    if before is None and num_parts(spans.number.shape[1]) > 1:
        layout = layout_of(exponents)
        return on_parts(_relative_part, (layout.activations, layout.tokens), layout.activations)(exponents, spans)
    is_token = spans.is_token[:, :, None]
    largest = jax.lax.stop_gradient(jnp.where(is_token, jnp.max(exponents, axis=-1), NOTHING))
    before = jnp.full_like(largest[:, 0], NOTHING) if before is None else before
    largest = jnp.concatenate([before[:, None], largest], axis=1)
    starts = jnp.pad(spans.starts, ((0, 0), (1, 0)))[:, :, None]

    def later(left: Any, right: Any) -> Any:
        return left[0] | right[0], jnp.where(right[0], right[1], jnp.maximum(left[1], right[1]))

    _, peaks = jax.lax.associative_scan(later, (jnp.broadcast_to(starts, largest.shape), largest), axis=1)
    features = jnp.exp(jnp.where(is_token[..., None], exponents - peaks[:, 1:, :, None], NOTHING)) + EPSILON
    return features, peaks[:, :-1] - peaks[:, 1:], peaks[:, 1:]


def _relative_part(exponents: Array, spans: Spans) -> tuple[Array, Array, Array]:
    """Returns the same of a device's part of texts: the largest ones before it come from the devices that have them."""
    spans = own_part(spans)
    peak = _relative(exponents, spans, None)[2][:, -1]
    goes_on, is_known = spans.number[:, -1, None] == 0, jnp.ones_like(spans.is_token[:, :1])

    def compose(later: Any, earlier: Any) -> Any:
        (peak, goes_on, is_known), (earlier_peak, earlier_goes_on, earlier_is_known) = later, earlier
        larger = jnp.where(goes_on & earlier_is_known, jnp.maximum(peak, earlier_peak), peak)
        return larger, goes_on & earlier_goes_on, is_known

    peak, _, is_known = before_part((peak, goes_on, is_known), compose)
    return _relative(exponents, spans, jnp.where(is_known, peak, NOTHING))

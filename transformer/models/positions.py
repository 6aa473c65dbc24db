"""How a model is told the order of tokens: on the embedding, by turning queries and keys, or by a bias on their products."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.config import ModelConfig

Angles = tuple[Float[Array, "B T 1 R"], Float[Array, "B T 1 R"]]
"""Cosine and sine of each position's angle in each of R planes."""


def sinusoidal_positions(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Returns the sines and cosines of Vaswani et al. (2017), section 3.5: sines first, then cosines."""
    frequencies = jnp.exp(jnp.arange(width // 2) * (-math.log(10_000.0) / (width // 2)))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def rotated_width(config: ModelConfig, head_width: int) -> int:
    """Returns how many of a head's dimensions are turned: an even number."""
    return 2 * round(config.rotary_share * head_width / 2)


def rotary_frequencies(config: ModelConfig, head_width: int) -> tuple[Float[np.ndarray, "R"], float]:
    """Returns the angle by which a step turns each of the R planes, and a factor for cosine and sine.

    Su et al. 2021 (arXiv:2104.09864), stretched beyond `rotary_original_length` by position interpolation (Chen et al.
    2023, arXiv:2306.15595), YaRN (Peng et al. 2023, arXiv:2309.00071), or in the way of Llama 3.1 (arXiv:2407.21783).
    """
    width = rotated_width(config, head_width)
    frequencies = config.rotary_base ** (-np.arange(0, width, 2, dtype=np.float64) / max(width, 1))
    factor, original = config.rotary_factor, config.rotary_original_length
    if config.rotary_scaling == "linear":
        return frequencies / factor, 1.0
    if config.rotary_scaling == "llama3":
        # Turns within the original length: below 1 stretched by the factor, above 4 left alone, smooth in between.
        turns = original * frequencies / (2 * math.pi)
        kept = np.clip((turns - 1) / (4 - 1), 0, 1)
        return frequencies * (kept + (1 - kept) / factor), 1.0
    if config.rotary_scaling == "yarn":

        def plane(turns: float) -> float:
            """The plane that turns so often within the original length."""
            return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rotary_base))

        low, high = max(math.floor(plane(32.0)), 0), min(math.ceil(plane(1.0)), width - 1)
        ramp = np.clip((np.arange(width // 2) - low) / max(high - low, 1e-3), 0, 1)
        attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return frequencies * (1 - ramp) + frequencies / factor * ramp, attention_factor
    return frequencies, 1.0


def rotary_angles(positions: Int[Array, "B T"], config: ModelConfig, head_width: int) -> Angles:
    """Returns cosine and sine of each position's angle in each plane."""
    frequencies, factor = rotary_frequencies(config, head_width)
    steps = jnp.asarray(frequencies, jnp.float32)
    if config.rotary_scaling == "dynamic_ntk" and (width := 2 * len(frequencies)) > 2:
        # The base grows with the text once that is longer than the original length (Peng et al. 2023, section 3.3).
        length = jnp.maximum(jnp.max(positions, axis=1) + 1, config.rotary_original_length).astype(jnp.float32)
        stretch = config.rotary_factor * length / config.rotary_original_length - (config.rotary_factor - 1)
        base = config.rotary_base * stretch ** (width / (width - 2))
        steps = base[:, None, None, None] ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    angles = positions[..., None, None].astype(jnp.float32) * steps
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return (cosine, sine) if factor == 1.0 else (factor * cosine, factor * sine)


def rotate(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Turns the plane (i, i + R) of every head by its position's angle; dimensions beyond 2 R stay."""
    cosine, sine = angles
    planes = cosine.shape[-1]
    turning = x[..., : 2 * planes].astype(jnp.float32)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if 2 * planes == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * planes :]], axis=-1)


@dataclass(frozen=True)
class Alibi:
    """Each head subtracts the distance times a slope of its own (Press et al. 2022, arXiv:2108.12409); a pytree."""

    slopes: Float[Array, "N"]

    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        distance = jnp.abs(query[:, :, None] - key[:, None, :]).astype(jnp.float32)
        return -self.slopes[:, None, None] * distance[:, None]


@dataclass(frozen=True)
class RelativeBuckets:
    """A learned number for each head and bucket of distances (Raffel et al. 2020, arXiv:1910.10683, section 2.1)."""

    table: Float[Array, "R N"]
    causal: bool
    max_distance: int

    def buckets(self, offset: Int[Array, "B T S"]) -> Int[Array, "B T S"]:
        """Returns the bucket of key position minus query position: half of them exact, the others logarithmic."""
        count = self.table.shape[0]
        first = jnp.zeros_like(offset)
        if self.causal:
            distance = jnp.maximum(-offset, 0)
        else:
            count //= 2
            first = jnp.where(offset > 0, count, 0)
            distance = jnp.abs(offset)
        exact = count // 2
        # At least 1 inside the logarithm, whose value below `exact` is not used.
        ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(self.max_distance / exact)
        far = jnp.minimum(exact + (ratio * (count - exact)).astype(jnp.int32), count - 1)
        return first + jnp.where(distance < exact, distance, far)

    def __call__(self, query: Int[Array, "B T"], key: Int[Array, "B S"]) -> Float[Array, "B N T S"]:
        values = self.table[self.buckets(key[:, None, :] - query[:, :, None])]
        return jnp.moveaxis(values, -1, 1)


jax.tree_util.register_dataclass(Alibi, ["slopes"], [])
jax.tree_util.register_dataclass(RelativeBuckets, ["table"], ["causal", "max_distance"])

Bias = Alibi | RelativeBuckets


def alibi_slopes(num_heads: int) -> Float[np.ndarray, "N"]:
    """Returns the slopes of Press et al.: a geometric series that ends at 2^-8; between powers of two, the odd ones of the
    next power's follow."""

    def series(count: int) -> np.ndarray:
        return 2.0 ** (-8.0 * np.arange(1, count + 1) / count)

    power = 2 ** math.floor(math.log2(num_heads))
    return np.concatenate([series(power), series(2 * power)[::2][: num_heads - power]]).astype(np.float32)

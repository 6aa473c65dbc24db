"""Rotary positions: queries and keys are turned, so that their products depend on distances alone."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.positions import Angles


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
        attention_factor = config.rotary_attention_factor
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
        return frequencies * (1 - ramp) + frequencies / factor * ramp, attention_factor
    return frequencies, 1.0


def rotary_angles(positions: Int[Array, "B T"], config: ModelConfig, head_width: int) -> Angles:
    """Returns cosine and sine of each position's angle in each plane.

    With `dynamic_ntk` they depend on the largest position at hand: beyond the original length, keys that a cache holds were
    turned as for the shorter text that there was then.
    """
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


def angles_of_layers(positions: Int[Array, "B T"], config: ModelConfig) -> dict[str, Angles]:
    """Returns the angles of the layers by their names in a `Context`."""
    kinds = {"rotary": LayerKind("attention")}
    if config.window_rotary_base is not None:
        kinds["window_rotary"] = LayerKind("attention", "window")
    return {name: rotary_angles(positions, own_rotary(config, kind), config.head_dim) for name, kind in kinds.items()}


def own_rotary(config: ModelConfig, kind: LayerKind) -> ModelConfig:
    """Returns the configuration with the base and scaling of a layer of this kind.

    Layers with a window never see far, so that theirs need no long wavelengths (Gemma 3, arXiv:2503.19786, section 2).
    """
    if kind.pattern != "window" or config.window_rotary_base is None:
        return config
    return dataclasses.replace(config, rotary_base=config.window_rotary_base, rotary_scaling="none")


def rotate(x: Float[Array, "B T N H"], angles: Angles) -> Float[Array, "B T N H"]:
    """Turns the plane (i, i + R) of every head by its position's angle; dimensions beyond 2 R stay."""
    cosine, sine = angles
    planes = cosine.shape[-1]
    turning = x[..., : 2 * planes].astype(jnp.float32)
    first, second = jnp.split(turning, 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    turned = turned.astype(x.dtype)
    return turned if 2 * planes == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * planes :]], axis=-1)

"""How config.json tells of rotary positions: `rope_parameters` since transformers 5, `rope_theta` and `rope_scaling` before."""

from collections.abc import Mapping
from typing import Any

from transformer.config import ConfigError, ModelConfig, nearest
from transformer.huggingface.header import shown
from transformer.huggingface.table import Translation

SCALINGS = {"default": "none", "linear": "linear", "dynamic": "dynamic_ntk", "yarn": "yarn", "llama3": "llama3"}
_OTHERWISE = {
    "yarn": {"beta_fast": 32.0, "beta_slow": 1.0},
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
"""Further numbers of a scaling, which are read with these values alone; CTranslate2 wants them written as fractions."""


def rotary(base: float = 10_000.0) -> Translation:
    """Returns the translation for a family whose wavelengths have the base `base` unless config.json has another."""
    return Translation(
        ("rope_parameters", "rope_theta", "rope_scaling", "partial_rotary_factor"),
        lambda theirs: read(theirs, base),
        write,
    )


def read(theirs: Mapping[str, Any], base: float) -> dict[str, Any]:
    old = theirs.get("rope_scaling")
    said = theirs.get("rope_parameters") or old or {}
    name = "rope_scaling" if said is old else "rope_parameters"
    if not isinstance(said, Mapping):
        raise ConfigError(f"{name} = {shown(said)} is not an object")
    kind = said.get("rope_type", said.get("type", "default"))
    if not isinstance(kind, str) or kind not in SCALINGS:
        guess = nearest(kind, tuple(SCALINGS)) if isinstance(kind, str) else ""
        raise ConfigError(f"{name}.rope_type = {shown(kind)} is none of {', '.join(SCALINGS)}{guess}")
    ours: dict[str, Any] = {
        "positions": "rotary",
        "rotary_base": said.get("rope_theta", theirs.get("rope_theta", base)),
        "rotary_scaling": SCALINGS[kind],
        "rotary_share": said.get("partial_rotary_factor", theirs.get("partial_rotary_factor") or 1.0),
    }
    if kind == "default":
        return ours
    if "factor" not in said:
        raise ConfigError(f"{name}.factor is missing, which {kind!r} needs")
    known = {"rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    for key, value in said.items():
        wanted = _OTHERWISE.get(kind, {}).get(key)
        if key not in known and value is not None and value != wanted:
            problem = f"is read with {wanted:g} alone" if wanted is not None else "is not known"
            raise ConfigError(f"{name}.{key} = {shown(value)} {problem} with {kind!r}")
    # The length from which dynamic scaling begins is always that of the model.
    given = None if kind == "dynamic" else said.get("original_max_position_embeddings")
    length = given or theirs.get("max_position_embeddings")
    return ours | {"rotary_factor": said["factor"]} | ({"rotary_original_length": length} if length else {})


def write(model: ModelConfig) -> dict[str, Any]:
    """Returns the older spelling, which every version, and other tools, read."""
    if model.positions != "rotary":
        raise ConfigError(f"model.positions = {model.positions!r}: only 'rotary' can be said")
    kind = next(theirs for theirs, ours in SCALINGS.items() if ours == model.rotary_scaling)
    share = {"partial_rotary_factor": model.rotary_share} if model.rotary_share != 1 else {}
    scaling = {"rope_type": kind, "factor": model.rotary_factor, **_OTHERWISE.get(kind, {})}
    if kind in _OTHERWISE:
        scaling["original_max_position_embeddings"] = model.rotary_original_length
    return {"rope_theta": model.rotary_base, "rope_scaling": None if kind == "default" else scaling, **share}

"""How config.json tells in what layers differ: windows, positions, experts, each with keys of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformer.config import ConfigError, ModelConfig
from transformer.huggingface.header import shown
from transformer.huggingface.table import Translation, kinds_of, layers_of

MOST_LAYERS = 2**14
"""As validation has it: before it is asked, lists are made that have an entry for each layer."""

Theirs = Mapping[str, Any]


@dataclass(frozen=True)
class Aspect:
    """One thing in which layers differ, and the keys that tell which layers have it."""

    of: Literal["window", "no_positions", "experts"]
    keys: tuple[str, ...]
    read: Callable[[Theirs, int], tuple[Sequence[bool], Mapping[str, Any]]]
    """Gives for each layer whether it has it, and further keys of ours."""
    write: Callable[[ModelConfig, Sequence[bool]], Mapping[str, Any]]


SPELT = {"window": ".window", "no_positions": "@none", "experts": "/experts"}


def layers(default_depth: int, *aspects: Aspect, mixer: str = "attention", has_dense: bool = True) -> Translation:
    """Returns the translation of `first_layers` and `layers` for a family whose layers differ in these aspects.

    Without `has_dense` all layers have experts.
    """

    def read(theirs: Theirs) -> dict[str, Any]:
        depth = theirs.get("num_hidden_layers", default_depth)
        if type(depth) is not int or not 0 < depth <= MOST_LAYERS:
            raise ConfigError(f"num_hidden_layers = {shown(depth)}: must be a number up to {MOST_LAYERS:,}")
        ours: dict[str, Any] = {}
        flags = {"experts": [True] * depth} if not has_dense else {}
        for aspect in aspects:
            found, more = aspect.read(theirs, depth)
            flags[aspect.of] = list(map(bool, found))
            ours.update(more)
        kinds = [
            mixer + "".join(text for name, text in SPELT.items() if name in flags and flags[name][layer])
            for layer in range(depth)
        ]
        return ours | layers_of(kinds)

    def write(model: ModelConfig) -> dict[str, Any]:
        told = {aspect.of for aspect in aspects} | ({"experts"} if not has_dense else set())
        possible = [mixer]
        for name, text in SPELT.items():
            with_it = [kind + text for kind in possible]
            only = name == "experts" and not has_dense
            possible = with_it if only else possible + with_it if name in told else possible
        kinds = kinds_of(model)
        if other := next((kind for kind in kinds if kind not in possible), None):
            key = "layers" if other in kinds_of_period(model) else "first_layers"
            label = f"model.{key} = {getattr(model, key)!r}"
            raise ConfigError(f"{label}: {other!r} is none of {', '.join(map(repr, possible))}")
        theirs: dict[str, Any] = {}
        for aspect in aspects:
            theirs.update(aspect.write(model, [SPELT[aspect.of] in kind for kind in kinds]))
        return theirs

    keys = [key for aspect in aspects for key in aspect.keys]
    return Translation(("num_hidden_layers", *dict.fromkeys(keys)), read, write)


def kinds_of_period(model: ModelConfig) -> list[str]:
    """Returns the kinds of one period, spelt as in `model.layers`."""
    return kinds_of(model)[len(model.first_kinds) :]


def windows_by_type(
    default: Callable[[Theirs, int], Sequence[bool]], window: int | None = 4096, has_switch: bool = False
) -> Aspect:
    """Returns windows that `layer_types` tells of, layer by layer, or `default` where it is left out.

    `has_switch`: there are none unless `use_sliding_window` says so.
    """
    types = {False: "full_attention", True: "sliding_attention"}

    def read(theirs: Theirs, depth: int) -> tuple[Sequence[bool], dict[str, Any]]:
        width = theirs.get("sliding_window", window)
        is_on = width is not None and (not has_switch or bool(theirs.get("use_sliding_window", False)))
        named = theirs.get("layer_types")
        if named is None:
            flags = list(default(theirs, depth)) if is_on else [False] * depth
        else:
            if not isinstance(named, list) or len(named) != depth:
                raise ConfigError(f"layer_types = {shown(named)}: must be a list of num_hidden_layers = {depth} names")
            if other := next((name for name in named if name not in types.values()), None):
                raise ConfigError(f"layer_types: {shown(other)} is none of {', '.join(types.values())}")
            flags = [name == types[True] for name in named]
        if any(flags) and not is_on:
            off = "use_sliding_window = False" if width is not None else "sliding_window = None"
            raise ConfigError(f"layer_types has {types[True]!r}, and {off}")
        return flags, {"window": width} if any(flags) else {}

    def write(model: ModelConfig, flags: Sequence[bool]) -> dict[str, Any]:
        theirs: dict[str, Any] = {"layer_types": [types[flag] for flag in flags]}
        theirs["sliding_window"] = model.window if any(flags) else None
        return theirs | ({"use_sliding_window": any(flags)} if has_switch else {})

    keys = ("layer_types", "sliding_window", *["use_sliding_window"] * has_switch)
    return Aspect("window", keys, read, write)


def windows_everywhere(window: int | None, has_switch: bool = False) -> Aspect:
    """Returns windows that all layers have, `sliding_window` wide, or none."""

    def read(theirs: Theirs, depth: int) -> tuple[Sequence[bool], dict[str, Any]]:
        width = theirs.get("sliding_window", window)
        is_on = width is not None and (not has_switch or bool(theirs.get("use_sliding_window", False)))
        return [is_on] * depth, {"window": width} if is_on else {}

    def write(model: ModelConfig, flags: Sequence[bool]) -> dict[str, Any]:
        if any(flags) and not all(flags):
            raise ConfigError(f"model.layers = {model.layers!r}: all layers must have a window, or none")
        theirs: dict[str, Any] = {"sliding_window": model.window if any(flags) else None}
        return theirs | ({"use_sliding_window": any(flags)} if has_switch else {})

    return Aspect("window", ("sliding_window", *["use_sliding_window"] * has_switch), read, write)


def beyond_first(theirs: Theirs, depth: int, default: int = 28) -> list[bool]:
    """Returns the windows of Qwen: in the layers from number `max_window_layers` on."""
    first = whole_number(theirs, "max_window_layers", default)
    return [layer >= first for layer in range(depth)]


def whole_number(theirs: Theirs, key: str, default: int, least: int = 0) -> int:
    """Returns a number that layers are counted by. Raises ConfigError for what is none."""
    value = theirs.get(key, default)
    if type(value) is not int or value < least:
        raise ConfigError(f"{key} = {shown(value)}: must be a whole number, at least {least}")
    return value

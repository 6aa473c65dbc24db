"""What a family's table is made of, and what follows from it: which of our arrays is which of their tensors.

A table is read in both directions. `Key`s and `Translation`s map config.json to a ModelConfig and back; `Line`s map tensors.
A line holds if the model has the parameter that it names, so that one table serves models with and without biases, with
a tied or a free head, with experts in some of the layers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from transformer.config import ConfigError, LayerKind, ModelConfig
from transformer.models.parameters import ParameterSpec, is_spec, parameter_specs
from transformer.models.transformer import Transformer

REQUIRED: Any = dataclasses.MISSING

Order = Callable[[ModelConfig], np.ndarray]
"""Which entry of theirs, along the joined axis, is the first of ours, the second, and so on."""


@dataclass(frozen=True)
class Part:
    """One of our arrays, by its path in a single layer, such as `decoder/layers/mixer/query/kernel`."""

    path: str
    order: Order | None = None
    """For entries that they keep in another order, such as the planes of rotary positions; None: the same."""


@dataclass(frozen=True)
class Line:
    """One tensor of theirs, and what of ours is in it."""

    theirs: str
    """Its name, with {layer} for the number of the layer, and {expert} for that of an expert, which ours are stacked by."""
    ours: str | Part | tuple[str | Part, ...]
    """What it is; several are joined along `axis`, in this order."""
    transposed: bool = False
    """Whether they keep the output's dimension first, as torch's Linear does; ours keep it last."""
    axis: int = 0
    """Dimension of theirs along which parts are joined and reordered."""
    groups: str = ""
    """Attribute of ModelConfig that counts groups (heads) along `axis`, each of which has a share of all parts; "": one group."""
    offset: float = 0.0
    """Ours less theirs: 1 for norms that multiply by 1 + w. Exact for what was read so; w itself may be rounded."""

    when: Callable[[ModelConfig], bool] = lambda model: True
    """Whether it counts, for one of ours that has another name in other models of the family."""

    @property
    def parts(self) -> tuple[Part, ...]:
        ours = self.ours if isinstance(self.ours, tuple) else (self.ours,)
        return tuple(Part(part) if isinstance(part, str) else part for part in ours)


def linear(theirs: str, ours: str) -> tuple[Line, Line]:
    """Returns the lines of torch's Linear `theirs` that is our Linear `ours`: kernel, and bias where there is one."""
    return Line(f"{theirs}.weight", f"{ours}/kernel", transposed=True), Line(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str, offset: float = 0.0) -> tuple[Line, Line]:
    """Returns the lines of a norm: scale, and bias where there is one."""
    return Line(f"{theirs}.weight", f"{ours}/scale", offset=offset), Line(f"{theirs}.bias", f"{ours}/bias")


@dataclass(frozen=True)
class Key:
    """A key of config.json that is a key of ModelConfig."""

    theirs: str
    ours: str
    default: Any = REQUIRED
    """What it is where config.json leaves it out: transformers' own default. A callable is given the whole of config.json."""
    values: Mapping[Any, Any] | None = None
    """Their value to ours, where they are spelt differently; of several of theirs the first is written."""


@dataclass(frozen=True)
class Translation:
    """What is not one key to one key. `read` gives keys of ModelConfig for theirs, `write` the reverse.

    Both raise ConfigError for what the other side cannot say.
    """

    theirs: tuple[str, ...]
    """The keys of config.json that it reads."""
    read: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[ModelConfig], Mapping[str, Any]]


@dataclass(frozen=True)
class Family:
    """Everything that is particular to a family; `transformer.huggingface` tells how to add one."""

    model_type: str
    architecture: str
    """transformers' class with the head over the vocabulary."""
    lines: tuple[Line, ...]
    keys: tuple[Key, ...]
    constants: Mapping[str, Any]
    """What of ModelConfig all models of the family share."""
    translations: tuple[Translation, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that must say this, or be left out: with another value the model would be another one."""
    harmless: tuple[str, ...] = ()
    """Keys of config.json that change nothing that a model computes when nothing is dropped."""
    prefix: str = ""
    """Of the names of all tensors but the head's, left out where a model was saved without its head."""
    repeats: Mapping[str, str] = field(default_factory=dict)
    """Tensors that some files repeat under another name; they must be equal."""
    ignored: tuple[str, ...] = ()
    """Patterns (regular expressions) of tensors that are no parameters: masks, frequencies."""
    left_out: Callable[[ModelConfig, str], str | None] = lambda model, name: None
    """Why a tensor, by its name, is left out though it is one of parameters, which is then said; None: it is not."""


@dataclass(frozen=True)
class Piece:
    """A part of one of their tensors that is one of our arrays, or one layer, or one expert, of it."""

    path: str
    """Path of our array in the tree of parameters."""
    at: tuple[int, ...]
    """Layer in the stack, and expert, where ours is stacked."""
    places: np.ndarray
    """Which entries of theirs along the line's axis."""


@dataclass(frozen=True)
class Tensor:
    """One of their tensors, placed."""

    name: str
    shape: tuple[int, ...]
    line: Line
    pieces: tuple[Piece, ...]


_STACKED = re.compile(r"^(\w+)/(first|layers)/(?:blocks/(\d+)/)?(.*)$")


def flat_specs(model: ModelConfig) -> dict[str, ParameterSpec]:
    """Returns the declaration of every parameter by its path."""
    specs = parameter_specs(Transformer(dataclasses.replace(model, scan_layers=False)))
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in leaves}


def tensors_of(family: Family, model: ModelConfig) -> list[Tensor]:
    """Returns every tensor of a model of the family, and where in our arrays it is.

    Raises ConfigError if a parameter of ours is none of theirs.
    """
    specs = flat_specs(model)
    # By path in a single layer: the numbers of the layers that are stacked, the path, and the declaration.
    single: dict[str, list[tuple[range, str, ParameterSpec]]] = {}
    for path, spec in specs.items():
        match = _STACKED.match(path)
        name = f"{match[1]}/layers/{match[4]}" if match else path
        layers = range(1) if match is None else _layers(model, match[1], match[2] == "first", int(match[3] or 0))
        single.setdefault(name, []).append((layers, path, spec))
    found: list[Tensor] = []
    covered: set[str] = set()
    for line in (line for line in family.lines if line.when(model)):
        first, *others = line.parts
        for number, (layers, path, spec) in enumerate(single.get(first.path, ())):
            joined = [(first, path, spec)] + [(part, *single[part.path][number][1:]) for part in others]
            covered.update(path for _, path, _ in joined)
            found += _placed(family, line, model, joined, layers)
    if lacking := [path for path in specs if path not in covered]:
        listed = ", ".join(f"{path} {specs[path].shape}" for path in lacking)
        raise ConfigError(f"{family.model_type} has no tensor for {listed}")
    return found


def _layers(model: ModelConfig, stack: str, is_first: bool, block: int) -> range:
    """Returns the numbers of the layers that a block of a period stands for, or one of those before the first period."""
    is_main = stack == ("decoder" if model.has_decoder else "encoder")
    first = model.first_kinds if is_main else ()
    if is_first:
        return range(len(first)) if len(set(first)) == 1 else range(block, block + 1)
    period, depth = (len(model.kinds), model.num_layers) if is_main else (len(model.encoder_kinds), model.encoder_depth)
    return range(len(first) + block, depth, period)


def _placed(
    family: Family, line: Line, model: ModelConfig, joined: Sequence[tuple[Part, str, ParameterSpec]], layers: range
) -> list[Tensor]:
    by_expert = "{expert}" in line.theirs
    stacked = joined[0][2].num_layers is not None
    leading = int(stacked) + int(by_expert)
    shapes = []
    for _, _, spec in joined:
        shape = (spec.shape[0] - (0 if stacked else spec.padding_rows), *spec.shape[1:])[leading:]
        shapes.append(shape[::-1] if line.transposed else shape)
    places = _places(line, model, [part for part, _, _ in joined], [shape[line.axis] for shape in shapes])
    whole = list(shapes[0])
    whole[line.axis] = sum(shape[line.axis] for shape in shapes)
    found = []
    for layer in range(joined[0][2].shape[0] if stacked else 1):
        for expert in range(joined[0][2].shape[int(stacked)] if by_expert else 1):
            name = line.theirs.format(layer=layers[layer], expert=expert)
            at = (layer,) * stacked + (expert,) * by_expert
            pieces = tuple(Piece(path, at, where) for (_, path, _), where in zip(joined, places, strict=True))
            found.append(Tensor(family.prefix + name if not is_head(name) else name, tuple(whole), line, pieces))
    return found


def _places(line: Line, model: ModelConfig, parts: Sequence[Part], sizes: Sequence[int]) -> list[np.ndarray]:
    """Returns where along the axis of theirs each entry of each part is."""
    groups = getattr(model, line.groups) if line.groups else 1
    total, before, found = sum(sizes) // groups, 0, []
    for part, size in zip(parts, sizes, strict=True):
        share = size // groups
        own = (np.arange(groups)[:, None] * total + before + np.arange(share)).reshape(-1)
        found.append(own if part.order is None else own[part.order(model)])
        before += share
    return found


def is_head(name: str) -> bool:
    """Returns whether a tensor belongs to the head, whose name never has the family's prefix."""
    return name.startswith(("lm_head.", "cls."))


def pattern_of(kinds: Sequence[str]) -> str:
    """Returns the shortest `model.layers` that names these kinds, one for each layer, such as `5*attention.window+attention`."""
    return _spelt(_period(kinds))


def _period(kinds: Sequence[str]) -> list[str]:
    """Returns the shortest beginning of `kinds` of which the whole is a repetition."""
    whole = list(kinds)
    lengths = (n for n in range(1, len(whole) + 1) if len(whole) % n == 0)
    return next(whole[:n] for n in lengths if whole == whole[:n] * (len(whole) // n))


def _spelt(kinds: Sequence[str]) -> str:
    parts: list[list[Any]] = []
    for kind in kinds:
        if parts and parts[-1][1] == kind:
            parts[-1][0] += 1
        else:
            parts.append([1, kind])
    return "+".join(kind if count == 1 else f"{count}*{kind}" for count, kind in parts)


def layers_of(kinds: Sequence[str]) -> dict[str, str | None]:
    """Returns `first_layers` and `layers` of these kinds, one for each layer, with as few different blocks as will do."""

    def num_blocks(first: int) -> tuple[int, int]:
        before, rest = kinds[:first], kinds[first:]
        return (1 if len(set(before)) == 1 else first) + len(_period(rest)), first

    first = min(range(len(kinds)), key=num_blocks)
    before = _spelt(kinds[:first]) if first else None
    return {"first_layers": before, "layers": pattern_of(kinds[first:])}


def kinds_of(model: ModelConfig) -> list[str]:
    """Returns the kind of each layer of the (decoder's) stack, spelt as in `model.layers`."""

    def spelt(kind: LayerKind) -> str:
        pattern = f".{kind.pattern}" if kind.pattern != "full" else ""
        feedforward = f"/{kind.feedforward}" if kind.feedforward != "dense" else ""
        return f"{kind.mixer}{pattern}{'' if kind.has_positions else '@none'}{feedforward}"

    return [spelt(kind) for kind in (*model.first_kinds, *model.kinds * model.num_periods)]

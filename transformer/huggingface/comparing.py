"""Two models, array by array: `transformer compare`."""

from dataclasses import dataclass
from typing import Any

import jax

from transformer.config import ModelConfig
from transformer.huggingface.exporting import differing, norms
from transformer.huggingface.translation import canonical
from transformer.models.parameters import Tree


@dataclass(frozen=True)
class Difference:
    """How far one array is from another of the same name."""

    name: str
    largest: float
    """Largest absolute difference."""
    relative: float
    """norm(a - b) / norm(b)."""


@dataclass(frozen=True)
class Comparison:
    config: list[str]
    """A sentence for each key of the model that differs."""
    shapes: list[str]
    """A sentence for each array that one of them lacks, or has in another shape."""
    arrays: list[Difference]

    def is_equal(self, tolerance: float) -> bool:
        """Returns whether the models are the same, arrays within `tolerance` of each other's norm."""
        return not (self.config or self.shapes) and all(item.relative <= tolerance for item in self.arrays)


def compare_models(one: tuple[ModelConfig, Tree], other: tuple[ModelConfig, Tree]) -> Comparison:
    """Returns in what two models, with their parameters, differ."""
    models = [canonical(model) for model, _ in (one, other)]
    arrays: list[dict[str, Any]] = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for _, tree in (one, other)
    ]
    first, second = arrays
    shapes = [f"{name} {first[name].shape} is in the first alone" for name in sorted(first.keys() - second.keys())]
    shapes += [f"{name} {second[name].shape} is in the second alone" for name in sorted(second.keys() - first.keys())]
    found = []
    for name in sorted(first.keys() & second.keys()):
        if first[name].shape != second[name].shape:
            shapes.append(f"{name} has the shape {first[name].shape}, {second[name].shape} in the second")
        else:
            found.append(Difference(name, *norms(first[name], second[name])))
    return Comparison(differing(*models), shapes, found)

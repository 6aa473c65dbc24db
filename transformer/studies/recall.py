"""Which layers can look up what they were told: associative recall by mixer and number of pairs.

Attention keeps every key and value; a recurrent layer has a state of a size that does not grow with the text, and must
make room in it (Arora et al. 2023, arXiv:2312.04927).
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

from transformer.config import Config, replace
from transformer.config.model import Mixer
from transformer.studies.study import Outcome, Study, Trial, by_trial, spread, table

PAIRS = (4, 8, 16)


def trials(base: Config) -> list[Trial]:
    """Returns every mixer with every number of pairs, in models of the recipe's width and depth."""
    made = []
    for mixer in get_args(Mixer):
        for pairs in PAIRS:
            length = 3 * pairs
            config = replace(
                base,
                model={"layers": f"{mixer}/none"},
                objective={"num_pairs": pairs},
                data={"sequence_length": length},
            )
            made.append(
                Trial(f"{mixer}_{pairs}", config, {"mixer": mixer, "pairs": pairs, "state": state_size(config)})
            )
    return made


def state_size(config: Config) -> int:
    """Returns how many numbers a layer remembers of a text of the full length."""
    import jax

    from transformer.checkpointing.run import resolve
    from transformer.models.cache import CacheSpec
    from transformer.models.mixers import make_mixer

    model = resolve(config, 260).model
    mixer = make_mixer(model, model.kinds[0], model.num_layers)
    specs = mixer.cache_specs(1, config.data.sequence_length)
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, CacheSpec))
    return sum(math.prod(spec.shape) for spec in leaves)


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns the share of values that each mixer recalls."""
    pairs = sorted({outcome.facts["pairs"] for outcome in outcomes})
    rows = []
    for mixer in dict.fromkeys(outcome.facts["mixer"] for outcome in outcomes):
        groups = [group for group in by_trial(outcomes).values() if group[0].facts["mixer"] == mixer]
        found = {group[0].facts["pairs"]: group for group in groups}
        cells = [spread([100 * o.final["accuracy"] for o in found.get(n, []) if o.final], 1) for n in pairs]
        sizes = [f"{group[0].facts['state']:,}" for group in (found[min(found)], found[max(found)])]
        rows.append([mixer, f"{groups[-1][0].parameters:,}", " to ".join(dict.fromkeys(sizes)), *cells])
    header = ["mixer", "parameters", "state of a layer", *(f"{n} pairs" for n in pairs)]
    return f"Values recalled, in percent; the state in numbers, for the shortest and the longest text.\n\n{table(header, rows)}"


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws the share over the number of pairs, a curve a mixer."""
    axes = figure.subplots()
    for mixer in dict.fromkeys(outcome.facts["mixer"] for outcome in outcomes):
        points: dict[int, list[float]] = {}
        for outcome in outcomes:
            if outcome.facts["mixer"] == mixer and outcome.final:
                points.setdefault(outcome.facts["pairs"], []).append(100 * outcome.final["accuracy"])
        pairs = sorted(points)
        axes.plot(pairs, [sum(points[n]) / len(points[n]) for n in pairs], "o-", label=mixer.replace("_", " "))
    axes.set(xlabel="pairs of key and value", ylabel="values recalled (%)")
    axes.set_xscale("log", base=2)
    axes.legend(frameon=False, fontsize=8)


STUDY = Study(trials, report, draw)

"""Which layers can look up what they were told: associative recall by mixer and number of pairs.

Attention keeps every key and value; a layer with a state has to make room in one that does not grow with the text (Arora
et al. 2023, arXiv:2312.04927).
"""

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np

from transformer.benchmarks.report import table
from transformer.config import RECURRENT, Config, replace
from transformer.config.model import LinearMixer, Mixer
from transformer.studies.study import Outcome, Study, Trial, by_trial, last, spread

PAIRS = (4, 16, 64)


def trials(base: Config) -> list[Trial]:
    """Returns every mixer with every number of pairs, as the recipe's second layer, and some with a larger state.

    Those have as large a one as attention keeps of the longest text: linear mixers of most pairs, recurrent networks of
    fewest, for which they are already up to 24 times as wide.
    """
    made = [_trial(base, mixer, pairs) for mixer in get_args(Mixer) for pairs in PAIRS]
    made += [_trial(base, mixer, max(PAIRS), state_width=6 * max(PAIRS)) for mixer in get_args(LinearMixer)]
    kept = 6 * min(PAIRS) * base.model.width
    for mixer in RECURRENT:
        made.append(_trial(base, mixer, min(PAIRS), recurrent_width=kept // (2 if mixer == "lstm" else 1)))
    return made


def _trial(base: Config, mixer: str, pairs: int, **state: int) -> Trial:
    if mixer == "performer" and state:
        state = {"num_features": state["state_width"]}
    model = {"layers": f"attention.window/none+{mixer}/none"} | state
    changes = {"objective": {"num_pairs": pairs}, "data": {"sequence_length": 3 * pairs}}
    config = replace(base, model=model, **changes)
    name = f"{mixer}_wide" if state else mixer
    return Trial(f"{name}_{pairs}", config, {"mixer": name, "pairs": pairs, "state": state_size(config)})


def state_size(config: Config) -> int:
    """Returns how many numbers the last layer remembers of a text of the full length."""
    import jax

    from transformer.checkpointing.run import resolve
    from transformer.models.cache import CacheSpec
    from transformer.models.mixers import make_mixer

    model = resolve(config, 260).model
    mixer = make_mixer(model, model.kinds[-1], model.num_layers)
    specs = mixer.cache_specs(1, config.data.sequence_length)
    leaves = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, CacheSpec))
    return sum(math.prod(spec.shape) for spec in leaves)


def told_most_often(pairs: int, num_values: int = 128, examples: int = 4096) -> float:
    """Returns the share that is right of answers that name the value told most often: all that can be known without keys."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, pairs + 1, examples)
    right = sum(int(np.bincount(rng.integers(0, num_values, count)).max()) for count in counts)
    return right / int(counts.sum())


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns the share of values that each mixer recalls."""
    pairs = sorted({outcome.facts["pairs"] for outcome in outcomes})
    rows = []
    for mixer in dict.fromkeys(outcome.facts["mixer"] for outcome in outcomes):
        groups = [group for group in by_trial(outcomes).values() if group[0].facts["mixer"] == mixer]
        found = {group[0].facts["pairs"]: group for group in groups}
        cells = [spread([100 * share for share in last(found.get(n, []), "accuracy")], 1) for n in pairs]
        sizes = [f"{group[0].facts['state']:,}" for group in (found[min(found)], found[max(found)])]
        rows.append(
            [mixer.replace("_", " "), f"{groups[-1][0].parameters:,}", " to ".join(dict.fromkeys(sizes)), *cells]
        )
    rows.append(["*the value told most often*", "–", "–", *(f"{100 * told_most_often(n):.1f}" for n in pairs)])
    header = ["mixer", "parameters", "state", *(f"up to {n} pairs" for n in pairs)]
    return f"Values recalled, in percent; the state in numbers, of the shortest and of the longest text.\n\n{table(header, rows)}"


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws the share over the number of pairs, a curve a mixer."""
    axes = figure.subplots()
    colors: dict[str, Any] = {}
    for mixer in dict.fromkeys(outcome.facts["mixer"] for outcome in outcomes):
        groups = [group for group in by_trial(outcomes).values() if group[0].facts["mixer"] == mixer]
        points = {group[0].facts["pairs"]: shares for group in groups if (shares := last(group, "accuracy"))}
        pairs, shares = sorted(points), [100 * sum(points[n]) / len(points[n]) for n in sorted(points)]
        if (base := mixer.removesuffix("_wide")) == mixer:
            style, marker = ("-", "o") if len(colors) < 10 else ("--", "s")
            [line] = axes.plot(pairs, shares, style, marker=marker, label=mixer.replace("_", " "))
            colors[mixer] = line.get_color()
        else:
            axes.plot(pairs, shares, "x", color=colors.get(base), markersize=9, label=mixer.replace("_", " "))
    known = sorted({outcome.facts["pairs"] for outcome in outcomes})
    shares = [100 * told_most_often(pairs) for pairs in known]
    axes.plot(known, shares, ":", color="black", label="the value told most often")
    axes.set(xlabel="largest number of pairs", ylabel="values recalled (%)")
    axes.set_xscale("log", base=2)
    axes.set_xticks(known, list(map(str, known)))
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


STUDY = Study(trials, report, draw)

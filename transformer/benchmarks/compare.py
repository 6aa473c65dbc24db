"""`transformer benchmark compare`: two results side by side."""

from dataclasses import dataclass, field
from typing import ClassVar

from transformer.arguments import Overrides
from transformer.benchmarks.measure import Result, ratio, read_result
from transformer.config import Config, ConfigError

ALIKE = ("platform", "device_kind", "num_devices", "processor")
"""What of two machines has to be the same."""


@dataclass(frozen=True)
class Options:
    """Show the ratio of what two results measured, the second over the first: `compare A.json B.json`.

    Results are compared where they are of the same benchmark, subject and hardware; versions and options may differ.
    """

    WORDS: ClassVar[tuple[str, ...]] = ("before", "after")
    """Options that need not be spelt out."""

    before: str = ""
    """File of the first result."""
    after: str = ""
    """File of the second."""
    config: Overrides = field(default_factory=Config)


def run(options: Options) -> int:
    if problems := [f"--{name} is missing: name a result" for name in Options.WORDS if not getattr(options, name)]:
        raise ConfigError(problems)
    before, after = read_result(options.before), read_result(options.after)
    print(text_of(before, after))
    return 0


def text_of(before: Result, after: Result) -> str:
    """Returns the ratios in lines to read. Raises ConfigError for results of unlike things, with every difference."""
    if problems := list(differences(before, after)):
        raise ConfigError([f"the results cannot be compared: {problem}" for problem in problems])
    changed = [
        f"{package} {before.machine['versions'].get(package, 'none')} -> {after.machine['versions'].get(package, 'none')}"
        for package in sorted({*before.machine["versions"], *after.machine["versions"]})
        if before.machine["versions"].get(package) != after.machine["versions"].get(package)
    ]
    lines = [f"versions: {', '.join(changed)}"] if changed else []
    for name, first in before.measurements.items():
        second = after.measurements[name]
        whole, low, high = ratio(second.values, first.values)
        spread = f" (90% of resamples: {low:.4g} to {high:.4g})"
        lines.append(
            f"{name.replace('_', ' ')}: {whole:.4g}{spread}; {first.median:.4g} -> {second.median:.4g} {first.unit}"
        )
    return "\n".join(lines)


def differences(before: Result, after: Result) -> list[str]:
    """Returns in what the two are of different things."""
    if before.benchmark != after.benchmark:
        return [f"one is of {before.benchmark!r}, the other of {after.benchmark!r}"]
    pairs = {key: (before.subject.get(key), after.subject.get(key)) for key in {**before.subject, **after.subject}}
    pairs |= {key: (before.machine.get(key), after.machine.get(key)) for key in ALIKE}
    found = [
        f"{key} is {one!r} in one and {other!r} in the other" for key, (one, other) in pairs.items() if one != other
    ]
    lacking = before.measurements.keys() ^ after.measurements.keys()
    return found + [f"only one has {name}" for name in sorted(lacking)]

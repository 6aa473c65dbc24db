"""What all processes of a run must hold alike, and how those that differ are named."""

import functools
import hashlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path

from transformer.config import Config, get, keys

MAY_DIFFER = ("parallel.process_id", "parallel.coordinator", "data.cache_dir", "compilation_cache_dir")
"""Who a process is, by which name it calls process 0, and where its machine keeps what can be made again: the fingerprint
of the data is compared by itself."""
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")

PACKAGE = Path(__file__).parents[1]


@functools.cache
def code_hash() -> str:
    """Returns a hash of this package's source."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


def facts_of(config: Config) -> dict[str, str]:
    """Returns what processes compare before anything else: every key of the configuration, the code, the packages."""
    facts = {key: repr(get(config, key)) for key in keys() if key not in MAY_DIFFER}
    facts["the source of transformer"] = code_hash()[:12]
    facts["python"] = platform.python_version()
    versions = {found.name: found.version for found in distributions()}
    return facts | {f"the package {name}": versions.get(name, "absent") for name in PACKAGES}


def differences(held: Sequence[Mapping[str, str]]) -> list[str]:
    """Returns a sentence for each fact, and value of it, in which processes differ from most of the others.

    `held` are the facts of process 0, 1, …; where no value has a majority, that of process 0 is what the others differ from.
    """
    problems = []
    for name in dict.fromkeys(name for facts in held for name in facts):
        values = [facts.get(name, "absent") for facts in held]
        most, votes = Counter(values).most_common(1)[0]
        usual = most if 2 * votes > len(values) else values[0]
        others = "the others" if 2 * votes > len(values) else _named(values, usual)
        for value in dict.fromkeys(value for value in values if value != usual):
            problems.append(f"{_named(values, value)}: {name} = {value}, {others} {usual}")
    return problems


def _named(values: Sequence[str], value: str) -> str:
    numbers = [str(number) for number, held in enumerate(values) if held == value]
    shown = numbers if len(numbers) < 9 else [*numbers[:8], f"{len(numbers) - 8} more"]
    return f"process{'es' * (len(numbers) > 1)} {', '.join(shown)}"

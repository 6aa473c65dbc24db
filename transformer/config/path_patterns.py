"""Patterns over the names of parameters, such as `decoder/*`, with which keys choose some of them."""

import fnmatch
import functools
import re
from collections.abc import Iterable, Iterator, Sequence

REGULAR = "re:"


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    is_regular = pattern.startswith(REGULAR)
    return re.compile(pattern.removeprefix(REGULAR) if is_regular else fnmatch.translate(pattern))


def matches(patterns: Iterable[str], path: str) -> bool:
    """Returns whether one of the patterns is of the whole path; a `*` reaches over slashes."""
    return any(_compiled(pattern).fullmatch(path) for pattern in patterns)


def unused(patterns: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Returns the patterns that no path matches."""
    return [pattern for pattern in patterns if not any(matches((pattern,), path) for path in paths)]


def pattern_problems(key: str, patterns: Iterable[str]) -> Iterator[str]:
    """Yields a sentence for each pattern that can match nothing."""
    for pattern in patterns:
        if not pattern.removeprefix(REGULAR):
            yield f"{key} = {pattern!r}: is no pattern, such as decoder/* or re:.*/kernel"
        try:
            _compiled(pattern)
        except re.error as error:
            yield f"{key} = {pattern!r}: is no regular expression: {error}"

"""A Python process of our own, for what should not share this one's memory, caches or devices."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def own_process(program: str, arguments: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
    """Returns command and environment of a Python that runs `program` and finds the package that this one has."""
    search_path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    return [sys.executable, "-c", program, *arguments], environment

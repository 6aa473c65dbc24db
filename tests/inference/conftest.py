"""Programs of these tests run for milliseconds and compile for seconds: they are compiled without optimization."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def quickly_compiled() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

"""What the tests of verbs that use a run share."""

import jax
import pytest

from transformer.parallel import sharding, startup
from transformer.parallel.sharding import make_mesh


@pytest.fixture
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has its devices already; one of them is enough."""
    monkeypatch.setattr(startup, "_started", True)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(sharding, "make_mesh", lambda config: make_mesh(config, jax.devices()[:1]))

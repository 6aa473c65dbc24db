"""Settings of the whole suite, made before any test imports JAX."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
# More threads than cores: JAX 0.10 deadlocks in collectives of eight simulated devices on two cores without it.
os.environ["NPROC"] = "16"

import jax
import jaxtyping
import pytest

pytest_plugins = ["running"]

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "transformer"

# Set here and not in the environment: the processes that tests start have one device, like a user's.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

# Programs that one test has compiled serve the others and the next run. A bounded cache is one that JAX locks.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "compilation"))
jax.config.update("jax_compilation_cache_max_size", 2**30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

# Annotations are enforced in every package. Configuration and command line are left out: their business is values of
# the wrong type, which have to reach their own messages.
jaxtyping.install_import_hook(
    [f"transformer.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py")], "beartype.beartype"
)


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home directory of the session's own: no test reads or fills the caches of whoever runs it."""
    directory = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(directory))
        patch.setenv("MPLCONFIGDIR", str(ROOT / ".pytest_cache" / "matplotlib"))
        yield directory

"""Settings of the whole suite, made before any test imports JAX."""

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# More threads than cores: JAX 0.10 deadlocks in collectives of eight simulated devices on two cores without it.
os.environ["NPROC"] = "16"
# Two workers of the suite share the cores, so that devices may wait for each other longer than XLA's 40 seconds.
os.environ["XLA_FLAGS"] = "--xla_cpu_collective_call_terminate_timeout_seconds=300"
# One piece of code from each program: cut in 32 it takes a quarter longer, and two workers keep the cores busy.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"
# Operations do not say from which lines they come: Shardy alone takes seconds to carry that through a split program.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"
# Programs of tests run for milliseconds and compile for seconds, so XLA does not optimise them; release 0.10 is then
# fastest with the older of its ways to compile fused operations, which later releases do not have.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
if version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import jaxtyping
import numpy as np
import pytest

from transformer.config import Config, replace

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


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Config]:
    """Makes configurations of a model that compiles in a second; changes are given as `replace` takes them."""
    tiny = replace(
        Config(),
        data={"sequence_length": 16, "tokenizer_vocab_size": 203},
        model={
            "vocab_size": 203,
            "num_layers": 2,
            "width": 32,
            "num_heads": 4,
            "num_positions": 16,
            "initial_scale": 0.1,
            "scan_layers": False,
        },
        train={"batch_size": 8, "num_steps": 20},
        parallel={"fsdp": 1},
    )
    return lambda **changes: replace(tiny, **changes)


@pytest.fixture(scope="session")
def tiny_batch() -> Callable[..., dict[str, np.ndarray]]:
    """Makes batches of packed documents and padding; the number of targets that count grows from row to row."""

    def make(config: Config, seed: int = 0) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        rows, length, vocab = config.train.batch_size, config.data.sequence_length, config.model.vocab_size
        tokens = rng.integers(4, vocab, (rows, length + 1), dtype=np.int32)
        starts = (rng.random((rows, length)) < 0.15) | (np.arange(length) == 0)
        segments = np.cumsum(starts, axis=1, dtype=np.int32)
        positions = np.arange(length) - np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        segments[::3, -3:] = 0
        same = np.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        counts = rng.random((rows, length)) < (np.arange(1, rows + 1)[:, None] / rows) ** 2
        return {
            "inputs": np.where(segments == 0, 0, tokens[:, :-1]),
            "targets": np.where(segments == 0, 0, tokens[:, 1:]),
            "positions": positions.astype(np.int32),
            "segment_ids": segments,
            "weights": (same & counts & (segments != 0)).astype(np.float32),
        }

    return make

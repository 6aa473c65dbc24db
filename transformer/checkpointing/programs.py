"""Compiled steps, kept beside XLA's cache of programs: a later start of the same step does not trace it either.

XLA's cache is asked for a program only when it has been traced and lowered, which takes longer than to load it. The files lie there
and not in run directories, which people pass on, because to read such a file can run code.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from transformer.config import Config, to_json, write_atomically
from transformer.parallel.agreement import code_hash

SECTIONS = ("model", "objective", "adapter", "optimizer", "train", "parallel", "seed")
"""What of the configuration a step depends on, besides the shapes of its arguments."""
SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable")
LENGTHS = ("sequence_length", "source_length", "window_length")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS", "NVIDIA_TF32_OVERRIDE")

_hits: list[str] = []
"""An entry for each program that came from XLA's cache."""
jax.monitoring.register_event_listener(
    lambda event, **_: _hits.append(event) if event.endswith("/cache_hits") else None
)


def stored_program(config: Config, mesh: Mesh, arguments: Sequence[Any], compile_program: Callable[[], Any]) -> Any:
    """Returns a program that an earlier run has kept, or compiles and keeps it.

    It runs on the devices of `mesh`, takes `arguments` (a state and a batch), and returns a new state and a dictionary of
    metrics. Without a compilation cache nothing is read or written. Whatever the program depends on makes another:
    configuration, our code, the packages that are installed, devices, flags.
    """
    if not config.compilation_cache_dir:
        return compile_program()
    name = _fingerprint(config, mesh, arguments)
    path = Path(config.compilation_cache_dir).expanduser() / "steps" / name
    if path.exists():
        try:
            return _loaded(path, mesh, arguments)
        except Exception as error:  # cut short, or not to be read: whatever that raises, the step can be compiled
            print(f"not loaded, so compiled: {path}: {error!r}", file=sys.stderr)
            with contextlib.suppress(OSError):
                path.unlink()
    before = len(_hits)
    program = compile_program()
    if len(_hits) == before:  # what XLA's cache has given lacks, on a CPU, the code that would have to be kept
        try:
            payload, _, tree = serialize_executable.serialize(program)
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            return program  # not every backend can
        names = json.dumps(sorted(jax.tree.unflatten(tree, range(tree.num_leaves))[1])).encode()
        digest = hashlib.sha256(payload).hexdigest().encode()
        with contextlib.suppress(OSError):  # a cache that cannot be written to is no reason to stop
            write_atomically(path, names + b"\n" + digest + b"\n" + payload)
    return program


def _loaded(path: Path, mesh: Mesh, arguments: Sequence[Any]) -> Any:
    names, digest, payload = path.read_bytes().split(b"\n", 2)
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise ValueError("damaged")
    results = (arguments[0], dict.fromkeys(json.loads(names), 0))
    trees = [jax.tree.structure(tree) for tree in ((tuple(arguments), {}), results)]
    return serialize_executable.deserialize_and_load(payload, *trees, execution_devices=list(mesh.devices.flat))


def _fingerprint(config: Config, mesh: Mesh, arguments: Sequence[Any]) -> str:
    tree = json.loads(to_json(config))
    facts = [tree[section] for section in SECTIONS] + [tree["data"][name] for name in LENGTHS]
    facts += [
        (leaf.shape, str(leaf.dtype), str(getattr(leaf, "sharding", None))) for leaf in jax.tree.leaves(arguments)
    ]
    facts += [(device.id, device.device_kind, device.process_index) for device in mesh.devices.flat]
    facts += [_packages(), code_hash(), _processor()]
    facts += [jax.process_count(), jax.process_index()]
    facts += [jax.devices()[0].client.platform_version, *(os.environ.get(name, "") for name in VARIABLES)]
    facts += [getattr(jax.config, name) for name in SETTINGS]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _packages() -> list[str]:
    """Returns name and version of what is installed, from the names of directories: to read each one's metadata takes longer."""
    return sorted({found.name for place in sys.path for found in Path(place).glob("*.dist-info")})


def _processor() -> list[str]:
    """Returns what this processor can do: instructions of a program for CPUs that another one may not have."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})

"""The compiled step of a run, kept in its directory: a run that goes on where it stopped neither traces nor compiles.

Reading such a file can run code. So each is signed with a secret that lies beside the compilation cache, and what this user
has not written on a machine that shares this cache is never read.
"""

import functools
import hashlib
import hmac
import json
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
from jax.experimental import serialize_executable

from transformer.config import Config, to_json, write_atomically

PACKAGE = Path(__file__).parents[1]
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NPROC", "JAX_DISABLE_MOST_OPTIMIZATIONS", "JAX_DEFAULT_MATMUL_PRECISION")
DIGEST = 32


def stored_program(
    config: Config, workdir: Path, arguments: Sequence[Any], results: Any, compile_program: Callable[[], Any]
) -> Any:
    """Returns the program of the run in `workdir`, read from there, or compiled and written there.

    It takes `arguments` and returns a pair, of a tree like `results` and a dictionary of numbers. Without a compilation
    cache nothing is read or written. Anything that the program depends on makes another: configuration, our code, JAX,
    devices, flags.
    """
    if not config.compilation_cache_dir:
        return compile_program()
    path = workdir / f"step-{jax.process_index()}.program"
    key = _secret(Path(config.compilation_cache_dir).expanduser() / "secret")
    wanted = _fingerprint(config)
    content = path.read_bytes() if path.exists() else b""
    signature, rest = content[:DIGEST], content[DIGEST:]
    if hmac.compare_digest(signature, _signature(key, rest)) and rest.startswith(wanted):
        names, _, payload = rest[DIGEST:].partition(b"\n")
        trees = [
            jax.tree.structure(tree)
            for tree in ((tuple(arguments), {}), (results, dict.fromkeys(json.loads(names), 0)))
        ]
        return serialize_executable.deserialize_and_load(payload, *trees)
    program = compile_program()
    try:
        payload, _, tree = serialize_executable.serialize(program)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
        return program  # not every backend can
    names = json.dumps(sorted(jax.tree.unflatten(tree, range(tree.num_leaves))[1])).encode()
    rest = wanted + names + b"\n" + payload
    write_atomically(path, _signature(key, rest) + rest)
    return program


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).digest()


def _secret(path: Path) -> bytes:
    """Returns the secret in `path`, which only this user can read; makes one where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(DIGEST))
    except FileExistsError:
        pass
    return path.read_bytes()


def _fingerprint(config: Config) -> bytes:
    facts = [to_json(config), jax.__version__, jaxlib.__version__, _code(), jax.process_count(), jax.process_index()]
    facts += [(device.id, device.device_kind, device.process_index) for device in jax.devices()]
    facts += [jax.devices()[0].client.platform_version, *(os.environ.get(name, "") for name in VARIABLES), _processor()]
    return hashlib.sha256(repr(facts).encode()).digest()


def _processor() -> list[str]:
    """Returns what this processor can do: instructions of a program for CPUs that another one may not have."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    return sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})


@functools.cache
def _code() -> str:
    """Returns a hash of this package's source."""
    found = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()

"""Prepared data in a directory of its own, which may be in an object store: written once, read by every run of a pod.

    prepared.json       written last: fingerprint, what the shards are for, and size and digest of every file
    tokenizer/          as in a run directory
    tokens/KEY/         index.json and shards of each source, under the names that they have in the cache

Runs with `data.prepared` need neither the text nor TFDS. Shards are read where they lie if ArrayRecord can do that: in
a local or mounted directory, and on gs://. Otherwise each machine copies them into its cache when a run starts.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformer.config import Config, ConfigError, DataConfig, place, window_length, write_atomically
from transformer.data import files, packing, sources
from transformer.data.division import FORMAT
from transformer.data.forms import form_of
from transformer.data.prepared import Prepared

INDEX = "prepared.json"

READING = (
    *("sequence_length", "source_length", "window_length", "shift_windows", "shuffle", "weights", "cache_dir"),
    *("num_workers", "prefetch_batches", "prepared", "copy_prepared"),
)
"""Keys of `data` that say how a run reads what is prepared; `lengths` are checked by what the shards hold."""

NAMES = (
    *(
        "source",
        "path",
        "validation_path",
        "source_path",
        "target_path",
        "validation_source_path",
        "validation_target_path",
    ),
    "tokenizer_path",
)
"""Keys that name files of the machine that prepared."""

CONNECTIONS, BLOCK = 8, 2**22


def publish(config: Config, prepared: Prepared, target: str) -> None:
    """Copies tokenizer and shards to the directory `target`; what an earlier try has copied is not copied again."""
    root = place(target)
    with tempfile.TemporaryDirectory() as directory, _store_errors(target):
        prepared.tokenizer.save(Path(directory))
        local = {f"tokenizer/{path.name}": path for path in Path(directory).iterdir()}
        for source in prepared.sources:
            paths = [path for path in Path(source.train.directory).iterdir() if not path.name.startswith(".")]
            local |= {f"tokens/{path.parent.name}/{path.name}": path for path in paths}
        with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as threads:
            facts = list(threads.map(lambda item: _send(item[0], item[1], root), local.items()))
        index = {
            "format": FORMAT,
            "fingerprint": prepared.fingerprint,
            "sources": [source.train.directory.name for source in prepared.sources],
            "names": [source.name for source in prepared.sources],
            "kind": form_of(config).rows,
            "lengths": _lengths(config),
            "data": dataclasses.asdict(config.data),
            "files": dict(zip(local, facts, strict=True)),
        }
        _write(root / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def fetch(config: Config, say: Callable[[str], None]) -> tuple[str, str, list[str]]:
    """Returns, as `prepare.make` does, where the tokenizer is, the fingerprint, and where the shards of each source are.

    Raises ConfigError if nothing is published there, or if it is for another configuration.
    """
    name = config.data.prepared
    root = place(name)
    with _store_errors(name):
        try:
            index = json.loads((root / INDEX).read_text())
        except (FileNotFoundError, NotADirectoryError) as error:
            advice = "transformer prepare --publish makes such a directory"
            raise ConfigError(f"data.prepared = {name!r}: there is no {INDEX}; {advice}") from error
        if problems := list(_contradictions(config, index)):
            raise ConfigError(problems)
        in_place = isinstance(root, Path) or name.startswith("gs://")
        copies = not in_place if config.data.copy_prepared is None else config.data.copy_prepared
        if not (in_place or copies):
            where = f"data.prepared = {name!r}"
            raise ConfigError(
                f"data.copy_prepared = False: ArrayRecord reads gs:// and mounted directories, not {where}"
            )
        facts = {name: (size, digest) for name, (size, digest) in index["files"].items()}
        here = sources.cache_dir(config) / "published" / index["fingerprint"]
        how = f"copied from {name} to {here}" if copies else f"read in {name}"
        say(f"{', '.join(index['names'])}: {sum(size for size, _ in facts.values()) / 2**20:,.0f} MiB of tokens, {how}")
        with files.locked(here):
            _copy(root, here, {name: fact for name, fact in facts.items() if copies or not _is_shard(name)})
        at = here if copies else root
        return str(here / "tokenizer"), index["fingerprint"], [str(at / "tokens" / key) for key in index["sources"]]


def _is_shard(name: str) -> bool:
    return name.startswith("tokens/")


def _lengths(config: Config) -> list[int]:
    return [window_length(config)] if form_of(config).kind == "text" else list(packing.capacity(config))


def _contradictions(config: Config, index: dict[str, Any]) -> Iterator[str]:
    name, data, kind = config.data.prepared, config.data, form_of(config).rows
    where = f"data.prepared = {name!r}"
    if index["format"] != FORMAT:
        yield f"{where} was prepared by another version of this code, whose shards differ: publish it again"
    elif index["kind"] != kind:
        yield f"{where} holds examples of the kind {index['kind']!r}, and objective.name = {config.objective.name!r} needs {kind!r}"
    elif index["lengths"] != _lengths(config):
        yield f"{where} was prepared for lengths {index['lengths']}, and this configuration needs {_lengths(config)}"
    if data.weights and len(data.weights) != len(index["sources"]):
        yield f"data.weights has {len(data.weights)} numbers for {len(index['sources'])} sources of {where}"
    for item in dataclasses.fields(DataConfig):
        if item.name not in (*READING, *NAMES):
            stored = index["data"].get(item.name, item.default)
            if (value := getattr(data, item.name)) not in (stored, item.default):
                yield f"data.{item.name} = {value!r} contradicts {where}, which has {stored!r}"


def _send(name: str, path: Path, root: Any) -> tuple[int, str]:
    """Copies a file unless it is there, and returns size and digest."""
    target = root / name
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    size = path.stat().st_size
    # The name of a shard stands for its content: it has the fingerprint of all that decides it.
    if not (_is_shard(name) and target.exists() and _size(target) == size):
        _write(target, path.read_bytes())
    return size, digest


def _size(path: Any) -> int:
    return path.stat().st_size if isinstance(path, Path) else path.stat().length


def _write(target: Any, content: bytes) -> None:
    """Writes a file whole or not at all; a store never does otherwise."""
    write_atomically(target, content) if isinstance(target, Path) else target.write_bytes(content)


def _copy(root: Any, here: Path, wanted: dict[str, tuple[int, str]]) -> None:
    """Copies what is not there yet. A file has its name only when its size and digest have been found right."""
    missing = {name: fact for name, fact in wanted.items() if not (here / name).exists()}
    needed = sum(size for size, _ in missing.values())
    if shutil.disk_usage(here).free < needed:
        raise OSError(errno.ENOSPC, f"No space left for {needed:,} bytes of {root}", str(here))
    for directory in {(here / name).parent for name in missing}:
        directory.mkdir(parents=True, exist_ok=True)
        for killed in directory.glob(".*.partial"):
            killed.unlink()
    with concurrent.futures.ThreadPoolExecutor(CONNECTIONS) as threads:
        list(threads.map(lambda item: _receive(root / item[0], here / item[0], *item[1]), missing.items()))


def _receive(source: Any, target: Path, size: int, digest: str) -> None:
    partial = target.with_name(f".{target.name}.{secrets.token_hex(6)}.partial")
    found = hashlib.blake2b(digest_size=16)
    with source.open("rb") as stream, open(partial, "wb") as file:
        while block := stream.read(BLOCK):
            found.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    if partial.stat().st_size != size or found.hexdigest() != digest:
        partial.unlink()
        raise ConfigError(
            f"{source} is not what {INDEX} says that it is: {size:,} bytes of digest {digest}; publish it again"
        )
    os.replace(partial, target)


@contextlib.contextmanager
def _store_errors(url: str) -> Iterator[None]:
    """Turns whatever a client of a store raises into an OSError that names the directory."""
    try:
        yield
    except (ConfigError, OSError) as error:
        if isinstance(error, ConfigError) or error.errno or "://" not in url:
            raise
        raise OSError(errno.EIO, f"the object store failed: {error!r}", url) from error
    except Exception as error:
        if "://" not in url:
            raise
        raise OSError(errno.EIO, f"the object store failed: {error!r}", url) from error

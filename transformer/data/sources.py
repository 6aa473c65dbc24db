"""Sources of text: whatever `data.source` names becomes numbered documents with a fingerprint."""

import functools
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from transformer.config import Config
from transformer.data import files

STDLIB_EXCLUDES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Directories of the standard library that are not its own source, or only its tests."""


@dataclass(frozen=True)
class Documents:
    """Texts by number; small to pickle, since the records are opened by path."""

    records: Any
    name: str
    text_field: str
    errors: str

    def __getitem__(self, number: SupportsIndex) -> str:
        record = self.records[int(number)]
        return files.text_of(record, self.text_field, self.errors, f"example {number} of {self.name}")


@dataclass(frozen=True)
class Corpus:
    """A source of text whose fingerprint is known at once and whose documents are opened, or made, when needed."""

    name: str
    fingerprint: str
    open_records: Callable[[], Any]
    text_field: str
    errors: str

    @functools.cached_property
    def documents(self) -> Documents:
        return Documents(self.open_records(), self.name, self.text_field, self.errors)


def cache_dir(config: Config) -> Path:
    """Returns the directory of everything that preparing makes."""
    return Path(config.data.cache_dir).expanduser()


def open_sources(config: Config) -> list[Corpus]:
    """Returns the corpora that `data.path`, or else `data.source`, names. Raises ConfigError for what is not there."""
    if config.data.path:
        return [_local(config, "local_text", files.find_files(config.data.path, "data.path"))]
    return [_open(config, *source.partition(":")[::2]) for source in config.data.source]


def _open(config: Config, kind: str, name: str) -> Corpus:
    data, cache = config.data, cache_dir(config)
    if kind == "local_text":
        return _local(config, kind, files.find_files((name,), "data.source"))
    if kind == "tfds":
        from transformer.data import builders

        builder = builders.named(name, Path(os.environ.get("TFDS_DATA_DIR") or cache / "datasets"))
        key = files.fingerprint(kind, builder.info.full_name)
        return Corpus(f"tfds:{name}", key, lambda: builders.build(builder), data.text_field, data.errors)
    if kind == "hf":
        from transformer.data import huggingface

        state, records = huggingface.load(name, cache)
        return Corpus(f"hf:{name}", files.fingerprint(kind, state), lambda: records, data.text_field, data.errors)
    root = Path(sysconfig.get_path("stdlib"))
    found = [files.TextFile(str(path.relative_to(root)), path) for path in sorted(root.rglob("*.py"))]
    return _local(config, kind, [file for file in found if not STDLIB_EXCLUDES & set(Path(file.name).parts)])


def _local(config: Config, kind: str, found: Sequence[files.TextFile]) -> Corpus:
    """A corpus of files that one of our TFDS builders stores as ArrayRecord, anew whenever the files changed."""
    data, cache = config.data, cache_dir(config)
    key = files.fingerprint(kind, files.fingerprint_files(found, cache), data.text_field, data.errors)

    def open_records() -> Any:
        from transformer.data import builders

        builder = builders.PythonStdlib if kind == "python_stdlib" else builders.LocalText
        return builders.build(builder(found, data.text_field, data.errors, cache / "datasets" / key))

    return Corpus(kind, key, open_records, "text", data.errors)

"""Sources: whatever `data.source` names becomes numbered documents with a fingerprint."""

import dataclasses
import functools
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from transformer.config import Config
from transformer.data import files
from transformer.data.forms import Form, form_of

STDLIB_EXCLUDES = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})
"""Directories of the standard library that are not its own source, or only its tests."""


@dataclass(frozen=True)
class Documents:
    """Documents by number; small to pickle, since the records are opened by path."""

    records: Any
    name: str
    form: Form

    def __getitem__(self, number: SupportsIndex) -> str:
        return self.form.document(self.records[int(number)], f"example {number} of {self.name}")


@dataclass(frozen=True)
class Corpus:
    """A source of text whose fingerprint is known at once and whose documents are opened, or made, when needed."""

    name: str
    fingerprint: str
    open_records: Callable[[], Any]
    form: Form
    held_out: "Corpus | None" = None
    """What to validate on, where it is given."""
    label_names: tuple[str, ...] = ()
    """What the source calls its labels, in order of their numbers; none where it does not say."""

    @functools.cached_property
    def documents(self) -> Documents:
        return Documents(self.open_records(), self.name, self.form)


def cache_dir(config: Config) -> Path:
    """Returns the directory of everything that preparing makes."""
    return Path(config.data.cache_dir).expanduser()


def open_sources(config: Config) -> list[Corpus]:
    """Returns the corpora that `data.path`, else `data.source_path`, else `data.source` names. Raises ConfigError for what is not there."""
    data = config.data
    if data.source_path and not data.path:
        pairs = _aligned(config, "source_path", "target_path")
        if not data.validation_source_path:
            return [pairs]
        return [_holding_out(pairs, _aligned(config, "validation_source_path", "validation_target_path"))]
    if data.path:
        corpus = _local(config, "local_text", files.find_files(data.path, "data.path"))
        if not data.validation_path:
            return [corpus]
        found = files.find_files(data.validation_path, "data.validation_path")
        return [_holding_out(corpus, _local(config, "local_text", found))]
    return [_open(config, *source.partition(":")[::2]) for source in config.data.source]


def _holding_out(corpus: Corpus, held_out: Corpus) -> Corpus:
    """Returns `corpus` with what to validate on."""
    key = files.fingerprint(corpus.fingerprint, held_out.fingerprint)
    return dataclasses.replace(corpus, fingerprint=key, held_out=held_out)


def _open(config: Config, kind: str, name: str) -> Corpus:
    form, cache = form_of(config), cache_dir(config)
    if kind == "local_text":
        return _local(config, kind, files.find_files((name,), "data.source"))
    if kind == "tfds":
        from transformer.data import builders

        builder = builders.named(name, Path(os.environ.get("TFDS_DATA_DIR") or cache / "datasets"))
        key = files.fingerprint(kind, builder.info.full_name, *form.key)
        names = builders.label_names(builder, form)
        corpus = Corpus(f"tfds:{name}", key, lambda: builders.build(builder), form, label_names=names)
        if not (split := config.data.validation_split):
            return corpus
        key = files.fingerprint(key, split)
        return _holding_out(corpus, Corpus(f"tfds:{name}/{split}", key, lambda: builders.build(builder, split), form))
    if kind == "hf":
        from transformer.data import huggingface

        def opened(split: str) -> Corpus:
            state, records = huggingface.load(name, cache, split)
            key, names = files.fingerprint(kind, state, *form.key), huggingface.label_names(records, form)
            return Corpus(f"hf:{name}", key, lambda: records, form, label_names=names)

        split = config.data.validation_split
        return _holding_out(opened(""), opened(split)) if split else opened("")
    root = Path(sysconfig.get_path("stdlib"))
    found = [files.TextFile(str(path.relative_to(root)), path) for path in sorted(root.rglob("*.py"))]
    return _local(config, kind, [file for file in found if not STDLIB_EXCLUDES & set(Path(file.name).parts)])


def _local(config: Config, kind: str, found: Sequence[files.TextFile]) -> Corpus:
    """A corpus of files that one of our TFDS builders stores as ArrayRecord, anew whenever the files changed."""
    form, cache = form_of(config), cache_dir(config)
    what = (form.fields[0][1], form.errors) if form.kind == "text" else form.key
    key = files.fingerprint(kind, files.fingerprint_files(found, cache), *what)

    def open_records() -> Any:
        from transformer.data import builders

        builder = builders.PythonStdlib if kind == "python_stdlib" else builders.LocalText
        return builders.build(builder(found, form, cache / "datasets" / key))

    return Corpus(kind, key, open_records, _stored(form))


def _aligned(config: Config, source_key: str, target_key: str) -> Corpus:
    """A corpus of pairs: the lines of the files that two keys of `data` name, in the order given."""
    form, cache = form_of(config), cache_dir(config)
    found = [
        [file for pattern in getattr(config.data, name) for file in files.find_files((pattern,), f"data.{name}")]
        for name in (source_key, target_key)
    ]
    key = files.fingerprint("local_pairs", [files.fingerprint_files(part, cache) for part in found], form.errors)

    def open_records() -> Any:
        from transformer.data import builders

        return builders.build(builders.LocalPairs(found[0], found[1], form, cache / "datasets" / key))

    return Corpus("local_pairs", key, open_records, _stored(form))


def _stored(form: Form) -> Form:
    """Returns the form of what our builders store: documents, whatever they consist of."""
    return Form("text", (("data.text_field", "text"),), form.errors)

"""Local files of text: finding them, telling whether they changed, reading their documents, locking a directory."""

import contextlib
import fcntl
import glob
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformer.config import ConfigError, nearest, write_atomically

SUFFIXES = frozenset(
    ".txt .md .jsonl .parquet .rst .tex .html .xml .csv .tsv .json .yaml .toml .py .pyi .ipynb .c .h .cc .cpp .hpp .cu "
    ".rs .go .java .kt .js .ts .rb .php .sh .sql .lua .jl .hs .ml .scala .swift .r .el".split()
)
"""What a directory is searched for; a file that is named, or matches a glob, is read whatever its suffix."""

LARGEST_DOCUMENT = 2**30
"""Bytes of the longest document: it is held in memory, and a TFDS example must stay below 2 GiB."""

LARGE_FILE = 2**26
"""Bytes from which on a file's hash is remembered by its size and modification time."""

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


@dataclass(frozen=True)
class TextFile:
    """A file of a corpus; `name` is its path below the corpus, which does not change when the corpus is moved."""

    name: str
    path: Path

    @property
    def kind(self) -> str:
        """Suffix that says how documents lie in the file, without that of the compression."""
        return (self.path.with_suffix("") if self.path.suffix in COMPRESSIONS else self.path).suffix.lower()

    def open(self) -> io.BufferedReader:
        """Opens the file for reading bytes, decompressed; one that was cut short raises OSError at its end."""
        import pyarrow

        stream: Any = pyarrow.input_stream(str(self.path), COMPRESSIONS.get(self.path.suffix))
        return io.BufferedReader(stream)


def find_files(patterns: Sequence[str], key: str) -> list[TextFile]:
    """Returns the files that paths, directories and globs (`**` too) name, once each, sorted by name.

    Raises ConfigError, with `key` as the place of the mistake, for paths that do not exist and globs without a match.
    """
    found: set[Path] = set()
    problems = []
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = [p for p in path.rglob("*") if p.is_file() and TextFile("", p).kind in SUFFIXES]
            problem = "is a directory without text files (a glob such as DIR/**/* takes files of any suffix)"
        else:
            names = [path] if path.is_file() else glob.glob(str(path), recursive=True)
            matches = [Path(name) for name in names if os.path.isfile(name)]
            problem = "matches no file" if glob.has_magic(pattern) else "does not exist"
        found |= {match.resolve() for match in matches}
        problems += [] if matches else [f"{key} = {pattern!r}: {problem}"]
    if problems:
        raise ConfigError(problems)
    root = os.path.commonpath([path.parent for path in found])
    return sorted((TextFile(os.path.relpath(path, root), path) for path in found), key=lambda file: file.name)


def fingerprint(*parts: object) -> str:
    """Returns 20 hexadecimal digits that change whenever a part does."""
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=10).hexdigest()


def fingerprint_files(files: Sequence[TextFile], cache_dir: Path) -> str:
    """Returns a fingerprint of names and contents; where the files lie does not matter."""
    return fingerprint([(file.name, _hash(file.path, cache_dir)) for file in files])


def _hash(path: Path, cache_dir: Path) -> str:
    status = path.stat()
    remembered = cache_dir / "hashes" / fingerprint(path, status.st_size, status.st_mtime_ns, status.st_ino)
    if status.st_size >= LARGE_FILE and remembered.exists():
        return remembered.read_text()
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    if status.st_size >= LARGE_FILE:
        write_atomically(remembered, digest)
    return digest


def read_records(file: TextFile, fields: Sequence[str], errors: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields a file's records, each with its place: lines of .jsonl, rows of .parquet, otherwise the whole file.

    A whole file is the first of `fields`. Raises ConfigError for broken files and for what is not UTF-8, with the byte
    offset, after decompression.
    """
    readers = {".parquet": _read_parquet, ".jsonl": _read_json_lines}
    with _told_if_broken(file):
        yield from readers.get(file.kind, _read_whole)(file, fields, errors)


def read_lines(file: TextFile, errors: str, ends: bool = False) -> Iterator[str]:
    """Yields a file's lines, without their ends unless asked for. Raises ConfigError as `read_records` does."""
    offset = 0
    with _told_if_broken(file), file.open() as stream:
        for line in stream:
            text = decode(line, errors, str(file.path), offset)
            yield text if ends else text.removesuffix("\n").removesuffix("\r")
            offset += len(line)


@contextlib.contextmanager
def _told_if_broken(file: TextFile) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowInvalid) as error:
        if isinstance(error, OSError) and error.errno:  # the disk's, not the file's
            raise
        raise ConfigError(f"{file.path} is broken: {error}") from error


def decode(data: bytes, errors: str, where: str, offset: int = 0) -> str:
    """Returns the text of UTF-8 bytes; raises ConfigError with the offset of the first that is not, unless replaced."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{data[error.start]:02x} at offset {offset + error.start}"
        hint = "data.errors = 'strict'; 'replace' reads it as U+FFFD"
        raise ConfigError(f"{where} is not UTF-8: {byte} ({hint})") from error


def value_of(record: Mapping[str, Any], field: str, where: str, key: str) -> Any:
    """Returns what stands in a record's field, which `key` names. Raises ConfigError if there is none."""
    if field not in record:
        names = sorted(record)
        raise ConfigError(f"{key} = {field!r}: {where} has the fields {', '.join(names)}{nearest(field, names)}")
    return record[field]


def text_of(record: Mapping[str, Any], field: str, errors: str, where: str, key: str) -> str:
    """Returns the text in a record's field, which may be str, bytes or None (no text). Raises ConfigError."""
    value = value_of(record, field, where, key)
    if not isinstance(value, str | bytes | None):
        raise ConfigError(f"{key} = {field!r}: {where} has {type(value).__name__} there, not text")
    # JSON can spell half a surrogate pair, which is not Unicode.
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value or b""
    return decode(data, errors, where)


def _read_whole(file: TextFile, fields: Sequence[str], errors: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    with file.open() as stream:
        data = stream.read(LARGEST_DOCUMENT + 1)
    if len(data) > LARGEST_DOCUMENT:
        hint = "split it, or make it a .jsonl file with a document a line"
        raise ConfigError(f"{file.path} is one document of more than {LARGEST_DOCUMENT} bytes: {hint}")
    yield {fields[0]: data}, str(file.path)


def _read_json_lines(file: TextFile, fields: Sequence[str], errors: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    offset = 0
    with file.open() as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{file.path}, line {number},"
            text = decode(line, errors, str(file.path), offset)
            offset += len(line)
            try:
                record = json.loads(text) if text.strip() else dict.fromkeys(fields)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{where} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{where} is not a JSON object")
            yield record, where


def _read_parquet(file: TextFile, fields: Sequence[str], errors: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        columns = list(fields) if set(fields) <= set(names) else None
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                yield record, str(file.path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps every other process that locks `directory` waiting; the kernel frees the lock of a killed one."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that prepares {directory}", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

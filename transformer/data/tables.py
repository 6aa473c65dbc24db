"""Tables in files of text: .csv, whose fields may be quoted (RFC 4180), and .tsv, whose fields are as they stand."""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence

from transformer.config import ConfigError
from transformer.data import files

TABLES = (".csv", ".tsv")


def read_table(file: files.TextFile, errors: str) -> Iterator[tuple[dict[str, str], str]]:
    """Yields a file's rows by the names of the columns, which stand in its first line, each with its place.

    Raises ConfigError, with file and line, for a row with another number of fields, and for what is not UTF-8.
    """
    header: list[str] | None = None
    for number, row in _rows(file, errors):
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            if twice := [name for name in header if header.count(name) > 1]:
                raise ConfigError(f"{file.path}, line {number}, names the column {twice[0]!r} more than once")
            continue
        where = f"{file.path}, line {number},"
        if len(row) != len(header):
            fields = f"{len(row)} field{'s' * (len(row) != 1)}"
            raise ConfigError(f"{where} has {fields}, and the first line names {len(header)}: {', '.join(header)}")
        yield dict(zip(header, row, strict=True)), where
    if header is None:
        raise ConfigError(f"{file.path} is empty: its first line has to name the columns")


def _rows(file: files.TextFile, errors: str) -> Iterator[tuple[int, Sequence[str]]]:
    """Yields the fields of each row, and the number of its last line."""
    if file.kind == ".tsv":
        for number, line in enumerate(_lines(file, errors), start=1):
            line = line.rstrip("\r\n")
            yield number, line.split("\t") if line else []
        return
    csv.field_size_limit(files.LARGEST_DOCUMENT)
    reader = csv.reader(_lines(file, errors), strict=True)
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{file.path}, line {reader.line_num}, is not CSV: {error}") from error


def _lines(file: files.TextFile, errors: str) -> Iterator[str]:
    """Yields lines with their ends, without the mark with which some programs begin a file."""
    for number, line in enumerate(files.read_lines(file, errors, ends=True)):
        yield line.removeprefix("\ufeff") if number == 0 else line


def typed(record: Mapping[str, str], label: str, text: str, kind: str) -> Mapping[str, object]:
    """Returns a row whose label, which a table can only spell, is what records have: a number, or a list for words."""
    if label not in record or text not in record:
        return record
    spelt = record[label].strip()
    if kind == "words":
        return {**record, text: record[text].split(), label: [_label(part) for part in spelt.split()]}
    return {**record, label: None if not spelt else _number(spelt) if kind == "number" else _label(spelt)}


def _label(spelt: str) -> int | str:
    return int(spelt) if re.fullmatch(r"-?\d+", spelt) else spelt


def _number(spelt: str) -> float | str:
    try:
        return float(spelt)
    except ValueError:
        return spelt

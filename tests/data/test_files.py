"""Reading local files, and what is said about those that cannot be read."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from transformer.config import ConfigError
from transformer.data import files
from transformer.data.files import TextFile, find_files, fingerprint_files
from transformer.data.forms import Form, read_documents


def read(path: Path, field: str = "text", errors: str = "strict") -> list[str]:
    return list(read_documents(TextFile(path.name, path), Form("text", (("data.text_field", field),), errors)))


def write(path: Path, data: bytes) -> None:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pyarrow.output_stream(str(path), compression) as stream:
        stream.write(data)


TEXT = "line 1\r\n\ttab é 漢 😀\n\n\x00 end"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".py", ".anything", ""])
@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_plain_text_is_one_exact_document(tmp_path: Path, suffix: str, compression: str) -> None:
    path = tmp_path / f"file{suffix}{compression}"
    write(path, TEXT.encode())
    assert read(path) == [TEXT]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_a_line_of_jsonl_is_a_document(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"file.jsonl{compression}"
    lines = [json.dumps({"id": 1, "body": TEXT}), "", json.dumps({"body": ""}), json.dumps({"body": None, "x": 2})]
    write(path, "\n".join(lines).encode())
    assert read(path, "body") == [TEXT, "", "", ""]


def test_a_row_of_parquet_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    texts = [TEXT, "", None, *(str(i) for i in range(3000))]
    pyarrow.parquet.write_table(pyarrow.table({"other": list(range(3003)), "text": texts}), path)
    assert read(path) == [text or "" for text in texts]
    with pytest.raises(ConfigError, match=r"data\.text_field = 'body': .*file\.parquet has the fields other, text"):
        read(path, "body")
    with pytest.raises(ConfigError, match=r"data\.text_field = 'other': .*file\.parquet has int there, not text"):
        read(path, "other")


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path, compression: str) -> None:
    path = tmp_path / f"latin.txt{compression}"
    data = b"caf\xe9 au lait"
    write(path, data)
    with pytest.raises(ConfigError, match=r"latin\.txt.* is not UTF-8: byte 0xe9 at offset 3 .*data\.errors"):
        read(path)
    assert read(path, errors="replace") == ["caf\ufffd au lait"]


def test_offset_in_jsonl_counts_from_the_begin_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl"
    first = '{"text": "é"}\n'.encode()
    path.write_bytes(first + b'{"text": "\xff"}\n')
    with pytest.raises(ConfigError, match=f"byte 0xff at offset {len(first) + 10} "):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"file\.jsonl, line 2, is not JSON"),
        ("[1, 2]", r"file\.jsonl, line 2, is not a JSON object"),
        ('{"body": "a", "id": 1}', r"data\.text_field = 'text': .*line 2, has the fields body, id"),
        ('{"text": ["a"]}', r"data\.text_field = 'text': .*line 2, has list there, not text"),
        ('{"text": "\\ud800"}', r"line 2, is not UTF-8"),
    ],
)
def test_mistakes_in_jsonl_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "file.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read(path)


@pytest.mark.parametrize("name", ["file.txt.gz", "file.txt.zst", "file.parquet", "file.jsonl.gz"])
@pytest.mark.parametrize("cut", [False, True])
def test_broken_files_are_named(tmp_path: Path, name: str, cut: bool) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT]}), path)
    else:
        write(path, (json.dumps({"text": TEXT}) + "\n").encode() * 99)
    path.write_bytes(path.read_bytes()[:-9] if cut else b"this is no such file")
    with pytest.raises(ConfigError, match=f"{name} is broken: "):
        read(path)


def test_a_document_that_memory_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "big.txt").write_text("x" * 101)
    monkeypatch.setattr(files, "LARGEST_DOCUMENT", 100)
    with pytest.raises(ConfigError, match=r"big\.txt is one document of more than 100 bytes"):
        read(tmp_path / "big.txt")


def test_paths_directories_and_globs_name_files_once_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.md", "deep/er/c.jsonl.gz", "deep/d.bin", "deep/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    def names(*patterns: str) -> list[str]:
        return [file.name for file in find_files([str(tmp_path / pattern) for pattern in patterns], "data.path")]

    assert names(".") == ["a.md", "b.txt", "deep/e.txt", "deep/er/c.jsonl.gz"]
    assert names("b.txt", ".", "*.txt") == names(".")
    assert names("**/*.txt") == ["b.txt", "deep/e.txt"]
    assert names("deep/**") == ["d.bin", "e.txt", "er/c.jsonl.gz"]
    assert names("deep/d.bin") == ["d.bin"]


def test_every_missing_path_is_reported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as caught:
        find_files([str(tmp_path / "no.txt"), str(tmp_path / "*.no"), str(tmp_path / "empty")], "data.path")
    missing, unmatched, empty = list(caught.value.problems)
    assert missing == f"data.path = '{tmp_path}/no.txt': does not exist"
    assert unmatched == f"data.path = '{tmp_path}/*.no': matches no file"
    assert empty.startswith(f"data.path = '{tmp_path}/empty': is a directory without text files")


@pytest.mark.parametrize("large", [False, True])
def test_fingerprint_follows_contents_and_names_not_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    monkeypatch.setattr(files, "LARGE_FILE", 1 if large else 2**30)

    def fingerprint(directory: str) -> str:
        return fingerprint_files(find_files([str(tmp_path / directory)], "data.path"), tmp_path / "cache")

    for directory in ("one", "two"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "a.txt").write_text("text")
    before = fingerprint("one")
    assert fingerprint("one") == before == fingerprint("two")
    (tmp_path / "two" / "a.txt").write_text("tent")
    assert fingerprint("two") != before
    (tmp_path / "one" / "a.txt").rename(tmp_path / "one" / "b.txt")
    assert fingerprint("one") != before

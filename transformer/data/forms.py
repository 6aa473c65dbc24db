"""What a corpus consists of: running text, pairs of texts, or texts with labels.

An example is a document; one that is not running text is the JSON list of its parts. So whatever measures, divides and
stores documents need not know the difference.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from transformer.config import Config, ConfigError, data_kind
from transformer.data import files
from transformer.data.chats import FIELDS, ChatForm, chat_form
from transformer.data.tokenizers import Tokenizer

RECORDS = (".jsonl", ".parquet")
"""Kinds of files that hold records with fields."""

Label = int | str


@dataclass(frozen=True)
class Form:
    """How a record becomes a document, and a document tokens."""

    kind: Literal["text", "pairs", "labelled", "chat", "preferences"]
    fields: tuple[tuple[str, str], ...]
    """Keys of the configuration that name a field of the record, and those names."""
    errors: str
    words: bool = False
    """Whether each word of a text has a label of its own."""
    chat: ChatForm | None = None
    """Of conversations and preferences, how they are written and read."""

    @property
    def key(self) -> tuple[object, ...]:
        """What decides the documents, for fingerprints; nothing where all is as usual."""
        usual = self.kind == "text" and self.fields[0][1] == "text" and self.errors == "strict"
        chat = () if self.chat is None else dataclasses.astuple(self.chat)
        return () if usual else (self.kind, self.fields, self.errors, self.words, *chat)

    def document(self, record: Mapping[str, Any], where: str) -> str:
        """Returns the document of a record; it is empty where a text is. Raises ConfigError, naming the field."""
        if self.chat is not None:
            return self.chat.document(record, where)
        if self.kind == "labelled":
            return self._labelled(record, where)
        texts = [files.text_of(record, field, self.errors, where, key) for key, field in self.fields]
        return texts[0] if self.kind == "text" else _to_json(texts) if all(texts) else ""

    def _labelled(self, record: Mapping[str, Any], where: str) -> str:
        (text_key, text_field), (key, field) = self.fields
        if not self.words:
            text = files.text_of(record, text_field, self.errors, where, text_key)
            value = files.value_of(record, field, where, key)
            return _to_json([text, _label(value, f"{key} = {field!r}: {where}")]) if text else ""
        words, labels = (_values(record, *names, where) for names in ((text_field, text_key), (field, key)))
        if len(words) != len(labels):
            raise ConfigError(f"{key} = {field!r}: {where} has {len(labels)} labels for {len(words)} words")
        texts = [files.text_of({text_field: word}, text_field, self.errors, where, text_key) for word in words]
        if not all(texts):
            raise ConfigError(f"{text_key} = {text_field!r}: {where} has an empty word")
        return _to_json([texts, [_label(value, f"{key} = {field!r}: {where}") for value in labels]]) if texts else ""

    def texts(self, document: str) -> Sequence[str]:
        """Returns the texts in a document."""
        if self.kind == "text":
            return (document,)
        if self.chat is not None:
            return self.chat.texts(document)
        parts = json.loads(document)
        return parts if self.kind == "pairs" else (" ".join(parts[0]),) if self.words else parts[:1]

    def labels(self, document: str) -> Sequence[Label]:
        """Returns the labels in a document."""
        found = json.loads(document)[1]
        return found if self.words else [found]

    def encode(self, document: str, tokenizer: Tokenizer, numbers: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two arrays that are stored of a document: ids of both texts, or ids and labels plus 1. Of conversations
        and preferences they are marked tokens, of one and of no text, or of the preferred one and the other.

        A text to read ends with `eos`; one to write, or with a label, lies between `bos` and `eos`. A text of words
        has a label, plus 1, on the first token of each word, and 0 on all others. `numbers` are those of named labels.
        """
        if self.chat is not None:
            found = [*self.chat.encode(document, tokenizer), np.zeros(0, np.int32)]
            return found[0], found[1]
        begin, end = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
        first, second = json.loads(document)
        if self.kind == "pairs":
            return np.append(tokenizer.encode(first), end), np.concatenate([begin, tokenizer.encode(second), end])
        found = [1 + (numbers[label] if isinstance(label, str) else label) for label in self.labels(document)]
        if not self.words:
            return np.concatenate([begin, tokenizer.encode(first), end]), np.array(found, np.int32)
        pieces = [tokenizer.encode(word if number == 0 else f" {word}") for number, word in enumerate(first)]
        starts = 1 + np.cumsum([0, *map(len, pieces[:-1])])
        ids = np.concatenate([begin, *pieces, end])
        labels = np.zeros(len(ids), np.int32)
        labels[starts] = found
        return ids, labels


def form_of(config: Config) -> Form:
    """Returns what the objective of a run learns from."""
    data, kind = config.data, data_kind(config)
    names = {
        "text": ("text_field",),
        "pairs": ("source_field", "target_field"),
        "labelled": ("text_field", "label_field"),
    }
    if (chat := chat_form(config)) is not None:
        known = FIELDS if kind == "chat" else ("prompt", "chosen", "rejected")
        wanted = (data.chat_field,) if kind == "chat" and data.chat_field else known
        return Form(kind, tuple(("data.chat_field", name) for name in (*wanted, "tools")), data.errors, chat=chat)
    fields = tuple((f"data.{name}", getattr(data, name)) for name in names[kind])
    return Form(kind, fields, data.errors, config.objective.name == "token_classification")


def read_documents(file: files.TextFile, form: Form) -> Iterator[str]:
    """Yields a file's documents: of lines of .jsonl, rows of .parquet, otherwise of the whole file.

    Raises ConfigError for what is not UTF-8 (with the byte offset, after decompression), broken files, missing fields.
    """
    if form.kind != "text" and file.kind not in RECORDS:
        needs = "data.source_path and data.target_path, or " if form.kind == "pairs" else ""
        wanted = {"labelled": "texts with labels", "chat": "conversations"}.get(form.kind, form.kind)
        raise ConfigError(f"{file.path}: {wanted} come from {needs}records in {' or '.join(RECORDS)} files")
    for record, where in files.read_records(file, [field for _, field in form.fields], form.errors):
        yield form.document(record, where)


def read_pairs(sources: Sequence[files.TextFile], targets: Sequence[files.TextFile], errors: str) -> Iterator[str]:
    """Yields the documents of two lists of files whose lines belong together. Raises ConfigError for unequal numbers."""
    lines = [(line for file in part for line in files.read_lines(file, errors)) for part in (sources, targets)]
    counts = [0, 0]
    while True:
        pair = [next(part, None) for part in lines]
        counts = [count + (line is not None) for count, line in zip(counts, pair, strict=True)]
        if None in pair:
            break
        yield _to_json(pair) if all(pair) else ""
    counts = [count + sum(1 for _ in part) for count, part in zip(counts, lines, strict=True)]
    if counts[0] != counts[1]:
        names = [" ".join(str(file.path) for file in part) for part in (sources, targets)]
        raise ConfigError(
            f"the files of data.source_path ({names[0]}) have {counts[0]:,} lines and those of data.target_path "
            f"({names[1]}) {counts[1]:,}: each line of one needs its line of the other"
        )


def _to_json(parts: Any) -> str:
    return json.dumps(parts, ensure_ascii=False)


def _values(record: Mapping[str, Any], field: str, key: str, where: str) -> list[Any]:
    value = files.value_of(record, field, where, key)
    if value is not None and not isinstance(value, list | tuple | np.ndarray):
        raise ConfigError(f"{key} = {field!r}: {where} has {type(value).__name__} there, not a list for words")
    return [] if value is None else list(value)


def _label(value: Any, where: str) -> Label:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, str):
        return value
    if not isinstance(value, int | np.integer | np.bool_) or value < 0:
        raise ConfigError(f"{where} has {value!r} there: a label is text or a whole number from 0 on")
    return int(value)

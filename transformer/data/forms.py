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
from transformer.data import answers, files, tables
from transformer.data.chats import FIELDS, ChatForm, chat_form
from transformer.data.tokenizers import Tokenizer

RECORDS = (".jsonl", ".parquet", *tables.TABLES)
"""Kinds of files that hold records with fields."""

Label = int | str
Target = Literal["class", "words", "number", "answers"]

TARGETS: dict[str, Target] = {"token_classification": "words", "regression": "number", "span_extraction": "answers"}
"""What a label is, by objective; of the others it is the class of the text."""


@dataclass(frozen=True)
class Form:
    """How a record becomes a document, and a document tokens."""

    kind: Literal["text", "pairs", "labelled", "chat", "preferences"]
    fields: tuple[tuple[str, str], ...]
    """Keys of the configuration that name a field of the record, and those names."""
    errors: str
    target: Target = "class"
    prefix: str = ""
    """What every text to read begins with."""
    label_words: tuple[str, ...] = ()
    """VALUE=WORD: what to write for a label."""
    chat: ChatForm | None = None
    """Of conversations and preferences, how they are written and read."""

    @property
    def words(self) -> bool:
        """Whether each word of a text has a label of its own."""
        return self.target == "words"

    @property
    def rows(self) -> str:
        """What the rows hold that are made of it: text, pairs, classes, numbers, answers, conversations or preferences."""
        return {"number": "numbers", "answers": "answers"}.get(self.target, self.kind)

    @property
    def key(self) -> tuple[object, ...]:
        """What decides the documents, for fingerprints; nothing where all is as usual."""
        usual = self.kind == "text" and self.fields[0][1] == "text" and self.errors == "strict"
        task = (self.target, self.prefix, self.label_words)
        more = task if self.target in ("number", "answers") or self.prefix or self.label_words else ()
        chat = () if self.chat is None else dataclasses.astuple(self.chat)
        return () if usual else (self.kind, self.fields, self.errors, self.words, *more, *chat)

    def document(self, record: Mapping[str, Any], where: str) -> str:
        """Returns the document of a record; it is empty where a text is. Raises ConfigError, naming the field."""
        if self.chat is not None:
            return self.chat.document(record, where)
        if self.kind == "labelled":
            return self._labelled(record, where)
        if self.kind == "pairs" and (self.label_words or len(self.fields) > 2):
            return self._task(record, where)
        texts = [self._text(record, number, where) for number in range(len(self.fields))]
        if self.kind == "text":
            return texts[0]
        return _to_json([self.prefix + texts[0], texts[1]]) if all(texts) else ""

    def _text(self, record: Mapping[str, Any], number: int, where: str) -> str:
        """Returns the text in one of the fields."""
        key, field = self.fields[number]
        return files.text_of(record, field, self.errors, where, key)

    def _task(self, record: Mapping[str, Any], where: str) -> str:
        """Returns the pair of what is read and the word for a label."""
        texts = [self._text(record, number, where) for number in range(len(self.fields)) if number != 1]
        key, field = self.fields[1]
        if self.label_words:
            value = files.value_of(record, field, where, key)
            value = value.decode(errors="replace") if isinstance(value, bytes) else value
            known = dict(word.split("=", 1) for word in self.label_words)
            if str(value) not in known:
                told = f"data.label_words has a word for {', '.join(map(repr, known))}"
                raise ConfigError(f"{key} = {field!r}: {where} has {value!r} there, and {told}")
            target = known[str(value)]
        else:
            target = self._text(record, 1, where)
        return _to_json([self.prefix + " ".join(texts), target]) if all([*texts, target]) else ""

    def _labelled(self, record: Mapping[str, Any], where: str) -> str:
        (text_key, text_field), (key, field), *_ = self.fields
        if not self.words:
            texts = [self._text(record, number, where) for number in range(len(self.fields)) if number != 1]
            value, place = files.value_of(record, field, where, key), f"{key} = {field!r}: {where}"
            if not all(texts):
                return ""
            if self.target == "answers":
                label: Any = answers.answers_of(value, texts[1], place)
            else:
                label = _number(value, place) if self.target == "number" else _label(value, place)
            return _to_json([texts[0], label, *texts[1:]])
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
        return parts if self.kind == "pairs" else (" ".join(parts[0]),) if self.words else [parts[0], *parts[2:]]

    def labels(self, document: str) -> Sequence[Label]:
        """Returns the labels in a document."""
        found = json.loads(document)[1]
        return found if self.words else [found]

    def encode(self, document: str, tokenizer: Tokenizer, numbers: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the two arrays that are stored of a document: ids of both texts, or ids and labels plus 1. Of conversations
        and preferences they are marked tokens, of one and of no text, or of the preferred one and the other.

        A text to read ends with `eos`; one to write, or with a label, lies between `bos` and `eos`, and another `eos` ends
        a second text. A text of words has a label, plus 1, on the first token of each word, and 0 on all others. `numbers`
        are those of named labels. A number is stored as the two halves of a float32, answers as `answers.encode` says.
        """
        if self.chat is not None:
            found = [*self.chat.encode(document, tokenizer), np.zeros(0, np.int32)]
            return found[0], found[1]
        begin, end = np.array([[tokenizer.bos], [tokenizer.eos]], np.int32)
        first, second, *others = json.loads(document)
        if self.target == "answers":
            known = [(start, text) for start, text in second]
            return answers.encode(first, answers.Passage(others[0], tokenizer), known, tokenizer)
        if self.kind == "pairs":
            return np.append(tokenizer.encode(first), end), np.concatenate([begin, tokenizer.encode(second), end])
        if not self.words:
            ids = [part for text in (first, *others) for part in (tokenizer.encode(text), end)]
            if self.target == "number":
                return np.concatenate([begin, *ids]), np.array([second], np.float32).view(np.uint16).astype(np.int32)
            label = 1 + (numbers[second] if isinstance(second, str) else second)
            return np.concatenate([begin, *ids]), np.array([label], np.int32)
        found = [1 + (numbers[label] if isinstance(label, str) else label) for label in second]
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
    second = ("second_text_field",) if data.second_text_field else ()
    fields = tuple((f"data.{name}", getattr(data, name)) for name in (*names[kind], *second))
    return Form(
        kind, fields, data.errors, TARGETS.get(config.objective.name, "class"), data.source_prefix, data.label_words
    )


def read_documents(file: files.TextFile, form: Form) -> Iterator[str]:
    """Yields a file's documents: of lines of .jsonl, rows of .parquet, otherwise of the whole file; but of rows of .csv
    and .tsv where text is not all.

    Raises ConfigError for what is not UTF-8 (with the byte offset, after decompression), broken files, missing fields.
    """
    if form.kind != "text" and (file.kind not in RECORDS or (form.chat and file.kind in tables.TABLES)):
        needs = "data.source_path and data.target_path, or " if form.kind == "pairs" else ""
        wanted = {"labelled": "texts with labels", "chat": "conversations"}.get(form.kind, form.kind)
        known = RECORDS if form.chat is None else [kind for kind in RECORDS if kind not in tables.TABLES]
        kinds = f"{', '.join(known[:-1])} or {known[-1]}"
        raise ConfigError(f"{file.path}: {wanted} come from {needs}records in {kinds} files")
    for record, where in read_fields(file, form):
        yield form.document(record, where)


def read_fields(file: files.TextFile, form: Form) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields a file's records, each with its place; what a table spells in a label's column is what other records have."""
    if form.kind == "text" or file.kind not in tables.TABLES:
        yield from files.read_records(file, [field for _, field in form.fields], form.errors)
        return
    (_, text), (_, label), *_ = form.fields
    for record, where in tables.read_table(file, form.errors):
        is_labelled = form.kind == "labelled"
        yield tables.typed(record, label, text, form.target) if is_labelled else record, where


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


def _number(value: Any, where: str) -> float:
    if value is None:
        raise ConfigError(f"{where} has no number there")
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ConfigError(f"{where} has {value!r} there, not a finite number")
    return float(value)


def _label(value: Any, where: str) -> Label:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if value is None or value == "":
        raise ConfigError(f"{where} has no label there")
    if isinstance(value, str):
        return value
    if not isinstance(value, int | np.integer | np.bool_) or value < 0:
        raise ConfigError(f"{where} has {value!r} there: a label is text or a whole number from 0 on")
    return int(value)

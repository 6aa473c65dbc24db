"""Conversations, and pairs of answers of which one is preferred: from records to documents, and from documents to tokens.

A document is JSON, as for all that is not running text (`forms`). Tokens carry, one by one, whether the assistant said them.
"""

import ast
import importlib.util
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from transformer.config import Config, ConfigError, data_kind
from transformer.data.tokenizers import Tokenizer

Message = dict[str, Any]
Spans = Sequence[tuple[int, int]]
Where = str

ROLES = ("system", "developer", "user", "assistant", "tool", "function")

SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant"},
    **{"system": "system", "tool": "tool", "observation": "tool", "function": "function"},
}
"""What ShareGPT's `from` says, and the role that it is."""

FIELDS = ("messages", "conversations")
"""Where conversations stand in records, by OpenAI's custom and by ShareGPT's."""

NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
"""What templates are told that the ends of a document are called, where a tokenizer has no names for them."""


@dataclass(frozen=True)
class ChatForm:
    """How records of conversations, or of preferences, become documents, and documents tokens."""

    kind: Literal["chat", "preferences"]
    template: str
    """Text of the chat template; empty: none, which only preferences between plain texts do without."""
    field: str
    """Field of a record; empty: the first of FIELDS that it has."""
    overlong: Literal["cut", "drop"]
    plain: bool
    """Whether preferences between texts stay without a template."""

    @property
    def conversations(self) -> tuple[str, ...]:
        """Names of those in a document."""
        return ("messages",) if self.kind == "chat" else ("chosen", "rejected")

    def document(self, record: Mapping[str, Any], where: Where) -> str:
        """Returns the document of a record, empty where the record is. Raises ConfigError, naming the place."""
        if all(value is None for value in record.values()):
            return ""
        if self.kind == "chat":
            chats: dict[str, Any] = {"messages": _messages(self._found(record, where), where)}
        else:
            chats = self._preference(record, where)
        if any(isinstance(value, str) for value in chats.values()):
            return json.dumps(chats, ensure_ascii=False)
        tools = _plain(record.get("tools"))
        chats["tools"] = _parsed(tools, f"{where} tools") if isinstance(tools, str) and tools.strip() else tools or None
        document = json.dumps(chats, ensure_ascii=False)
        self._written(document, where)
        return document

    def _found(self, record: Mapping[str, Any], where: Where) -> Any:
        for field in (self.field,) if self.field else FIELDS:
            if record.get(field) is not None:
                return record[field]
        wanted = f"data.chat_field = {self.field!r}" if self.field else f"none of {', '.join(FIELDS)} (data.chat_field)"
        raise ConfigError(f"{wanted}: {where} has the fields {', '.join(sorted(record))}")

    def _preference(self, record: Mapping[str, Any], where: Where) -> dict[str, Any]:
        """Returns the two conversations of a record, or prompt and answers where they are plain texts."""
        for field in ("chosen", "rejected"):
            if record.get(field) is None:
                raise ConfigError(f"{where} has no {field!r}, but the fields {', '.join(sorted(record))}")
        prompt, answers = _plain(record.get("prompt")), {n: _plain(record[n]) for n in ("chosen", "rejected")}
        if self.plain and isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
            return {"prompt": prompt, **answers}
        before = [] if prompt is None else _messages(prompt, where, "user")
        found: dict[str, Any] = {}
        for name, answer in answers.items():
            turns = _messages(answer, where, "assistant")
            # Some give the whole conversation with each answer, the prompt beside it.
            whole = turns[0]["role"] != "assistant"
            found[name] = turns if whole else before + turns
        shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*found.values(), strict=False))))
        if any(not _num_assistant(turns[shared:]) for turns in found.values()):
            raise ConfigError(f"{where} has the same answer as chosen and as rejected, or none")
        return found | {"shared": _num_assistant(found["chosen"][:shared])}

    def _written(self, document: str, where: Where, names: Mapping[str, str] = NAMES) -> list[tuple[str, Spans]]:
        """Returns the text of each conversation of a document, and which parts of it are learned from."""
        parts = json.loads(document)
        if isinstance(parts.get("prompt"), str):
            begin, end = names["bos_token"] + parts["prompt"], names["eos_token"]
            texts = [begin + parts[name] + end for name in ("chosen", "rejected")]
            return [(text, [(len(begin), len(text))]) for text in texts]
        if not self.template:
            advice = "data.chat_template names one, or a file, and a tokenizer's folder may have one"
            raise ConfigError(f"{where} is a conversation, and there is no chat template: {advice}")
        module = templates()
        if module.MARKS.search(document):
            raise ConfigError(
                f"{where} has one of the private characters U+10F500 to U+10F504, which stand for marks here"
            )
        written = []
        for name in self.conversations:
            try:
                chat = module.chat_of(self.template, parts[name], parts["tools"], names)
            except module.TemplateProblem as problem:
                raise ConfigError(f"{where}: the chat template {problem}") from problem
            spans = chat.spans
            if self.kind == "preferences":
                if len(spans) != _num_assistant(parts[name]):
                    raise ConfigError(f"{where}: the chat template leaves turns of the assistant out, or joins them")
                spans = spans[parts["shared"] :]
            if not spans:
                raise ConfigError(f"{where}: the chat template writes nothing of what the assistant says")
            written.append((chat.text, spans))
        return written

    def texts(self, document: str) -> list[str]:
        """Returns the texts in a document, without the tokens at their ends."""
        parts, unnamed = json.loads(document), dict.fromkeys(NAMES, "")
        if isinstance(parts.get("prompt"), str):
            return [parts["prompt"] + parts[name] for name in ("chosen", "rejected")]
        return [templates().write(self.template, parts[name], parts["tools"], unnamed) for name in self.conversations]

    def encode(self, document: str, tokenizer: Tokenizer) -> list[np.ndarray]:
        """Returns the tokens of each conversation of a document, marked as `marked` does."""
        names = special_names(tokenizer)
        return [marked(*encode(tokenizer, *chat)) for chat in self._written(document, "an example", names)]

    def fitted(self, tokens: np.ndarray, limit: int) -> np.ndarray:
        """Returns marked tokens without those after the last turn of the assistant that ends within `limit`; none if there
        is no such turn, or if all that is too long is to be left out."""
        if len(tokens) > limit:
            said = np.append(tokens & 1, 0)
            ends = np.flatnonzero((said[:-1] == 1) & (said[1:] == 0)) + 1
            ends = ends[ends <= limit]
            tokens = tokens[: ends[-1]] if len(ends) and self.overlong == "cut" else tokens[:0]
        # The first token has none before it that would predict it.
        return tokens if np.any(tokens[1:] & 1) else tokens[:0]


def chat_form(config: Config) -> ChatForm | None:
    """Returns how conversations are prepared, None for what learns from something else. Raises ConfigError."""
    kind = data_kind(config)
    if kind not in ("chat", "preferences"):
        return None
    module, data = templates(), config.data
    template = module.find(data)
    if not template and kind == "chat" and not data.prepared:
        known = ", ".join(module.BUILT_IN)
        where = f"there is none beside data.tokenizer_path = {data.tokenizer_path!r}"
        raise ConfigError(f"data.chat_template is needed: one of {known}, or a file; {where}")
    if template:
        try:
            module.compiled(template)
        except module.TemplateProblem as problem:
            raise ConfigError(f"data.chat_template {problem}") from problem
    return ChatForm(kind, template, data.chat_field, data.overlong_chats, not data.chat_template)


def templates() -> Any:
    """Returns the module of chat templates, which is loaded only where there are conversations. Raises ConfigError."""
    if importlib.util.find_spec("jinja2") is None:
        raise ConfigError("conversations need the package jinja2: pip install -e '.[hf]'")
    return importlib.import_module("transformer.data.chat_templates")


# Records.


def _plain(value: Any) -> Any:
    """Returns a field as plain JSON, whichever library read it; nothing of a message that is None."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _parsed(text: str, where: Where) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error


def _messages(value: Any, where: Where, role: str = "") -> list[Message]:
    """Returns the messages of a conversation in OpenAI's form or ShareGPT's; a text is one message of `role`."""
    value = _plain(value)
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [
            dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)
        ]  # a list for each key
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise ConfigError(f"{where} has {_told(value)} where a list of messages is expected")
    found = [_message(turn, f"{where} message {number}") for number, turn in enumerate(value, start=1)]
    if not role and not _num_assistant(found):
        raise ConfigError(f"{where} has no turn of the assistant, so that there is nothing to learn from")
    return found


def _message(turn: Message, where: Where) -> Message:
    if "role" not in turn and "from" in turn:
        turn = {"role": turn["from"], "content": turn.get("value"), **turn}
        del turn["from"]
        turn.pop("value", None)
        if turn["role"] not in SPEAKERS:
            raise ConfigError(f"{where}: from = {turn['role']!r} is none of {', '.join(SPEAKERS)}")
        turn["role"] = SPEAKERS[turn["role"]]
    if "role" not in turn:
        raise ConfigError(f"{where} has neither 'role' nor 'from', but {', '.join(sorted(turn)) or 'nothing'}")
    if turn["role"] not in ROLES:
        raise ConfigError(f"{where}: role = {turn['role']!r} is none of {', '.join(ROLES)}")
    content = turn.get("content")
    if content is None and not turn.get("tool_calls"):
        raise ConfigError(f"{where} has no content")
    if not isinstance(content, str | list | None):
        raise ConfigError(f"{where} has {_told(content)} as its content, not text")
    return turn


def _told(value: Any) -> str:
    return "nothing" if value is None or value == [] else f"{type(value).__name__}"


def _num_assistant(messages: Sequence[Message]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def of_docstrings(source: str, module: str) -> Iterator[dict[str, Any]]:
    """Yields conversations about the documented functions and classes of a Python file, as records.

    A corpus that every machine has: the question names what is asked about, the answer is the docstring's first paragraph.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    kinds = {ast.FunctionDef: "function", ast.AsyncFunctionDef: "function", ast.ClassDef: "class"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if not text or not text.split("\n\n")[0].strip():
            continue
        question = f"What is the {kinds[type(node)]} {node.name} of {module} for?"
        answer = " ".join(text.split("\n\n")[0].split())
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# Tokens.


def special_names(tokenizer: Tokenizer) -> dict[str, str]:
    """Returns what templates are told that the tokens at the ends of a document are called."""
    return getattr(tokenizer, "special_names", NAMES)


def encode(tokenizer: Tokenizer, text: str, spans: Spans = ()) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids of a text that a template has written, and of each whether it has a character within `spans`.

    A Hugging Face tokenizer is given the text as a whole, as the library transformers gives it. Others know no special tokens
    by name: the names of begin and end become these ids, and the pieces between them, and between spans, are encoded each by
    itself, as they are when the assistant is asked.
    """
    whole = getattr(tokenizer, "encode_with_offsets", None)
    if whole is not None:
        ids, offsets = whole(text)
        said = np.zeros(len(ids), bool)
        for first, after in spans:
            said |= (offsets[:, 0] < after) & (offsets[:, 1] > first)
        return ids, said
    cuts = sorted({0, len(text), *(place for span in spans for place in span)})
    pieces, said = [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for first, after in itertools.pairwise(cuts):
        ids = _with_ends(tokenizer, text[first:after])
        pieces.append(ids)
        said.append(np.full(len(ids), any(begin <= first < end for begin, end in spans)))
    return np.concatenate(pieces), np.concatenate(said)


def _with_ends(tokenizer: Tokenizer, text: str) -> np.ndarray:
    pieces: list[np.ndarray] = [np.zeros(0, np.int32)]
    for number, part in enumerate(text.split(NAMES["bos_token"])):
        pieces += [np.array([tokenizer.bos], np.int32)] if number else []
        for place, piece in enumerate(part.split(NAMES["eos_token"])):
            pieces += [np.array([tokenizer.eos], np.int32)] if place else []
            pieces += [tokenizer.encode(piece)] if piece else []
    return np.concatenate(pieces)


def marked(ids: np.ndarray, said: np.ndarray) -> np.ndarray:
    """Returns tokens as rows store them: twice the id, and 1 more where the assistant has said it."""
    return (2 * ids.astype(np.int64) + said).astype(np.int32)

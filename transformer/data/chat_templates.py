"""Chat templates: from the messages of a conversation to the text that a model reads, and which parts the assistant writes.

Templates are Jinja programs, as published with tokenizers, run in a sandbox in the way that the library transformers runs
them (extra `hf`). What the assistant writes stands between `{% generation %}` and `{% endgeneration %}` where a template has
these marks. Where it has none, it follows from what the template does: of all that is written while the template is at a
message of the assistant, that which comes after the prompt for one (`add_generation_prompt`), up to the end of its turn. The
template's program is changed so that it tells when it comes to a message and when it is done with it. Whatever this does not
tell exactly is refused, with the advice to put the marks in.
"""

import functools
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from transformer.config import ConfigError, DataConfig, nearest
from transformer.data.huggingface_tokenizer import template_in

Message = Mapping[str, Any]
"""`role`, `content` and whatever else a template knows, such as `tool_calls`: plain JSON."""

SAID, UNSAID, ASSISTANT, OTHER, DONE = map(chr, range(0x10F500, 0x10F505))
"""Private characters that a template's program writes to mark a text: around what the assistant writes, before a message of the
assistant or of anyone else, and after it."""

MARKS = re.compile(f"[{SAID}-{DONE}]")

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")

ADVICE = "mark what the assistant writes in it by {% generation %} and {% endgeneration %}"

BUILT_IN = {
    "plain": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' }}{{ '\\n' }}"
        "{% endfor %}{{ '<|assistant|>\\n' if add_generation_prompt }}"
    ),
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}"
    ),
}
"""Templates by name. `plain` needs no tokens but those that every tokenizer has."""


@dataclass(frozen=True)
class Chat:
    """A conversation as a template writes it."""

    text: str
    spans: tuple[tuple[int, int], ...] = ()
    """What the assistant writes, first and next character, turn by turn, each with the end of the turn."""


class TemplateProblem(Exception):
    """What a template does not take, or does not tell, in words."""


def find(data: DataConfig, folder: Path | None = None) -> str:
    """Returns the text of the template that `data.chat_template` names, else of the one in the tokenizer's folder; empty if
    there is none. Raises ConfigError for a file that does not exist and for a name that is not known."""
    name = data.chat_template
    if not name:
        path = Path(data.tokenizer_path).expanduser() if data.tokenizer_path else folder
        return "" if path is None else template_in(path if path.is_dir() else path.parent)
    if "{{" in name or "{%" in name:
        return name
    if name in BUILT_IN:
        return BUILT_IN[name]
    path = Path(name).expanduser()
    if path.is_dir():
        found = template_in(path)
        if not found:
            raise ConfigError(f"data.chat_template = {name!r}: the directory has no chat template")
        return found
    if not path.is_file():
        known = f"nor one of {', '.join(BUILT_IN)}{nearest(name, tuple(BUILT_IN))}"
        raise ConfigError(f"data.chat_template = {name!r} is neither a file {known}")
    return path.read_bytes().decode(errors="replace")


def write(
    template: str,
    messages: Sequence[Message],
    tools: Any = None,
    names: Mapping[str, str] | None = None,
    prompt: bool = False,
) -> str:
    """Returns a conversation as text, with a `prompt` for the assistant at its end if asked for.

    `names` are those of special tokens, such as `bos_token`. Raises TemplateProblem.
    """
    return _run(template, False, messages, tools, names or {}, prompt)


def chat_of(
    template: str, messages: Sequence[Message], tools: Any = None, names: Mapping[str, str] | None = None
) -> Chat:
    """Returns a conversation as text with what the assistant writes. Raises TemplateProblem."""
    names = names or {}
    text = write(template, messages, tools, names)
    marked = _Marked(_run(template, True, messages, tools, names))
    if marked.text != text:
        raise TemplateProblem(f"writes something else when its messages are marked: {ADVICE}")
    if GENERATION.search(template):
        return Chat(text, tuple(marked.said))
    begin, end = _generation_prompt(template, messages, tools, names), end_of_turn(template, tuple(names.items()))
    if not end:
        raise TemplateProblem(f"ends no turn of the assistant, so that none would learn to stop: {ADVICE}")
    spans = []
    for first, after in marked.turns:
        after = first + len(text[first:after].rstrip())
        if not text.startswith(begin, first):
            told = f"{text[first : first + len(begin) + 10]!r} and not with the prompt for it, {begin!r}"
            raise TemplateProblem(f"begins a turn of the assistant with {told}: {ADVICE}")
        if not text.endswith(end, 0, after):
            told = f"{text[max(first, after - len(end) - 10) : after]!r} and another with {end!r}"
            raise TemplateProblem(f"ends a turn of the assistant with {told}: {ADVICE}")
        spans.append((first + len(begin), after))
    return Chat(text, tuple(spans))


@functools.lru_cache(maxsize=16)
def end_of_turn(template: str, names: tuple[tuple[str, str], ...] = ()) -> str:
    """Returns what a template writes after the words of the assistant, without white space: the mark of the turn's end."""
    asked, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    found = _Marked(_run(template, True, [asked, answer], None, dict(names)))
    turns = found.turns or [(0, len(found.text))]
    turn = found.text[slice(*turns[-1])]
    _, word, after = turn.rpartition("answer")
    if not word:
        raise TemplateProblem(f"does not write what the assistant says as it is: {ADVICE}")
    return after.rstrip()


class _Marked:
    """A text that a changed program has written, without its marks, and what they tell."""

    def __init__(self, marked: str):
        self.said: list[tuple[int, int]] = []
        self.turns: list[tuple[int, int]] = []
        """What is written at a message of the assistant, header included."""
        self.last_message = 0
        """Where the last message is done with."""
        pieces, place, said, begun = [], 0, 0, []
        for part in re.split(f"([{SAID}-{DONE}])", marked):
            if part == SAID:
                said = place
            elif part == UNSAID:
                self.said += [(said, place)] if place > said else []
            elif part in (ASSISTANT, OTHER) and part:
                begun.append((part, place))
            elif part == DONE:
                who, first = begun.pop()
                # A loop within a turn that looks for something in all messages writes nothing.
                self.turns += [(first, place)] if who == ASSISTANT and place > first and not begun else []
                self.last_message = place
            else:
                pieces.append(part)
                place += len(part)
        self.text = "".join(pieces)


def _generation_prompt(template: str, messages: Sequence[Message], tools: Any, names: Mapping[str, str]) -> str:
    """Returns what a template writes at the end of a conversation to have the assistant go on."""
    first = next((number for number, message in enumerate(messages) if message["role"] == "assistant"), 0)
    for before in (messages[:first], messages) if first else (messages,):
        try:
            asked, plain = (_Marked(_run(template, True, before, tools, names, prompt)) for prompt in (True, False))
        except TemplateProblem:
            continue  # some take no conversation that stops there
        if asked.text.startswith(plain.text):
            return asked.text[len(plain.text) :]
        if asked.text[: asked.last_message] == plain.text[: plain.last_message]:
            return asked.text[asked.last_message :]
    raise TemplateProblem(f"does not tell what it writes before the assistant does: {ADVICE}")


# Running a template.


def _run(
    template: str,
    marked: bool,
    messages: Sequence[Message],
    tools: Any,
    names: Mapping[str, str],
    prompt: bool = False,
) -> str:
    program = compiled(template, marked)
    # What is None is left out, as many templates know of it only whether it is there.
    plain = [{key: value for key, value in message.items() if value is not None} for message in messages]
    given = {"messages": plain, "tools": tools, "documents": None, "add_generation_prompt": prompt}
    try:
        return program.render(**names, **given)
    except RecursionError as error:
        raise TemplateProblem("calls itself without end") from error
    except Exception as error:  # whatever a program may raise: it is the user's
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        where = f" in its line {lines[-1]}" if lines else ""
        told = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
        raise TemplateProblem(f"does not take it{where}: {told}") from error


@functools.lru_cache(maxsize=32)
def compiled(template: str, marked: bool = False) -> jinja2.Template:
    """Returns the program of a template, or the changed one that marks what it writes. Raises TemplateProblem."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Marking if marked else _Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": dict, "mark_message": _mark}
    try:
        program: nodes.Template | str = template
        if marked:
            program = _Turns().visit(environment.parse(template)).set_environment(environment)
        code: Any = environment.compile(program)
    except jinja2.TemplateSyntaxError as error:
        raise TemplateProblem(f"is not one: line {error.lineno}: {error.message}") from error
    return jinja2.Template.from_code(environment, code, environment.make_globals(None))


class _Generation(Extension):
    """The tag `generation`, which changes nothing of what is written."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Marking(_Generation):
    """The tag `generation` with marks around what it encloses."""

    def _written(self, caller: Callable[[], str]) -> str:
        return SAID + caller() + UNSAID


class _Turns(NodeTransformer):
    """Has the body of every loop say when it comes to a message, and when it is done with it."""

    def __init__(self) -> None:
        self._loops: list[tuple[str, int]] = []
        self._count = 0

    def visit_For(self, node: nodes.For) -> nodes.Node:
        line = node.lineno
        self._count += 1
        # The loop may give its own variable another value.
        self._loops.append((f"message_of_loop_{self._count}", line))
        self.generic_visit(node)
        done = self._mark(False)
        name, _ = self._loops.pop()
        if isinstance(node.target, nodes.Name):
            target = nodes.Name(node.target.name, "load")
            kept = nodes.Assign(nodes.Name(name, "store"), target).set_lineno(line)
            begin = self._call(name, True, line)
            node.body = [kept, begin, *node.body, done]
        else:
            kept = nodes.Assign(nodes.Name(name, "store"), nodes.Const(None)).set_lineno(line)
            node.body = [kept, *node.body]
        return node

    def visit_Continue(self, node: nodes.Continue) -> list[nodes.Node]:
        return [self._mark(False), node]

    def visit_Break(self, node: nodes.Break) -> list[nodes.Node]:
        return [self._mark(False), node]

    def _mark(self, begins: bool) -> nodes.Node:
        name, line = self._loops[-1]
        return self._call(name, begins, line)

    @staticmethod
    def _call(name: str, begins: bool, line: int) -> nodes.Node:
        arguments: list[nodes.Expr] = [nodes.Name(name, "load"), nodes.Const(begins)]
        call = nodes.Call(nodes.Name("mark_message", "load"), arguments, [], None, None)
        output = nodes.Output([call]).set_lineno(line)
        for child in output.find_all(nodes.Node):
            child.set_lineno(line)
        return output


def _mark(item: Any, begins: bool) -> str:
    """Returns the mark of a message; nothing for whatever else a loop is over."""
    if not (isinstance(item, Mapping) and "role" in item):
        return ""
    return (ASSISTANT if item["role"] == "assistant" else OTHER) if begins else DONE


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)

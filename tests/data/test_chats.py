"""Conversations and preferences: what records may be, and what becomes of them in rows."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

pytest.importorskip("jinja2")

from transformer.config import Config, ConfigError, ModelConfig, data_kind, replace
from transformer.config.absolute import absolute
from transformer.data import chats
from transformer.data.batches import token_arrays
from transformer.data.chats import chat_form
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared
from transformer.data.rows import RowSplit
from transformer.models.parameters import init_parameters
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of, with_examples
from transformer.training.step import make_gradient

MakeConfig = Callable[..., Config]
Record = dict[str, Any]

USER, ASSISTANT, SYSTEM = ({"role": role} for role in ("user", "assistant", "system"))


def chat(*texts: str) -> list[Record]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def conversations(count: int = 30) -> list[Record]:
    return [
        {"messages": chat(f"ask {n}", f"été {n}", *(["more"] * (n % 2)), *([f"end {n}"] * (n % 2)))}
        for n in range(count)
    ]


@pytest.fixture
def chat_config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from records, an objective and keys of `data` to a configuration."""

    def make(records: Sequence[Record], objective: str = "chat", **data: Any) -> Config:
        path = tmp_path / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        data = {
            "path": (str(path),),
            "chat_template": "plain",
            "sequence_length": 128,
            "validation_documents": 0.3,
        } | data
        return replace(make_config(**data), objective={"name": objective})

    return make


def ready(config: Config) -> Prepared:
    return with_examples(prepare(config, False), objective_of(config), config)


def segments(prepared: Prepared) -> list[tuple[str, str]]:
    """The text of each segment of each row, specials left out, and what of it is learned."""
    found = []
    for split in (prepared.sources[0].train, prepared.sources[0].validation):
        assert isinstance(split, RowSplit)
        for number in range(split.num_windows):
            row = split.window(number)
            for segment in range(1, row["segment_ids"].max() + 1):
                here = row["segment_ids"] == segment
                inputs, targets, weights = (row[name][here] for name in ("inputs", "targets", "weights"))
                assert inputs[1:].tolist() == targets[:-1].tolist()
                assert row["positions"][here].tolist() == list(range(len(inputs)))
                said = [int(token) for token in targets[weights > 0]]
                whole = prepared.tokenizer.decode(np.append(inputs, targets[-1:]))
                marks = "".join("</s>" if t == prepared.tokenizer.eos else "" for t in said)
                found.append((whole, prepared.tokenizer.decode(said) + marks))
    return found


def written(messages: Sequence[Record]) -> tuple[str, str]:
    text = "".join(f"<|{m['role']}|>\n{m['content']}\n" for m in messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    return text, "".join(answers) + "</s>" * len(answers)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "sharegpt"])
def test_rows_hold_every_conversation_once_with_what_the_assistant_says(
    chat_config: Callable[..., Config], tmp_path: Path, kind: str
) -> None:
    records, data = conversations(), {}
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "records.parquet")
        data = {"path": (str(tmp_path / "records.parquet"),)}
    elif kind == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        turns = [[{"from": names[m["role"]], "value": m["content"]} for m in record["messages"]] for record in records]
        records = [{"id": 3, "conversations": turn} for turn in turns]
    prepared = ready(chat_config(records, **data))
    expected = [written(record["messages"]) for record in conversations()]
    assert sorted(segments(prepared)) == sorted(expected)
    splits = [prepared.sources[0].train, prepared.sources[0].validation]
    # A byte each, and the end of each turn.
    said = sum(len(text.replace("</s>", "x").encode()) for _, text in expected)
    assert sum(split.num_tokens for split in splits) == said
    assert splits[0].num_windows < sum(shard.num_documents for shard in splits[0].shards)


def test_what_is_too_long_ends_with_the_last_answer_that_fits_or_is_left_out(
    chat_config: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    long = {"messages": chat("a", "b", "c", "d" * 30, "e", "f" * 200)}
    never = {"messages": chat("a" * 200, "b")}
    records = [*conversations(20), long, never]
    config = chat_config(records)
    prepare(config)
    told = capfd.readouterr().err
    assert (
        "1 train examples of local_text are longer than data.sequence_length = 128: they end with the last answer"
        in told
    )
    assert "examples of local_text are longer than data.sequence_length = 128: they are left out, number 22" in told
    whole, said = next(found for found in segments(ready(config)) if "d" * 30 in found[0])
    assert whole.endswith("d" * 30) and said == "b" + "d" * 30 + "</s>" * 2
    dropped = replace(config, data={"overlong_chats": "drop"})
    assert not [found for found in segments(ready(dropped)) if "d" * 30 in found[0]]


def test_preferences_are_two_segments_in_a_row(chat_config: Callable[..., Config]) -> None:
    asked, good, bad = chat("ask", "one", "more"), chat("", "good")[1:], chat("", "bad!")[1:]
    forms = [
        {"prompt": asked, "chosen": good, "rejected": bad},
        {"chosen": asked + good, "rejected": asked + bad},
        {"prompt": asked, "chosen": "good", "rejected": "bad!"},
        {"prompt": "ask", "chosen": asked + good, "rejected": asked + bad},
    ]
    others = [{"chosen": chat(f"{n}", "x"), "rejected": chat(f"{n}", "yy")} for n in range(20)]
    for form in forms:
        found = segments(ready(chat_config([*others, form], "dpo", sequence_length=256)))
        place = next(number for number, (text, _) in enumerate(found) if "good" in text)
        assert [found[place], found[place + 1]] == [
            (written(asked + good)[0], "good</s>"),
            (written(asked + bad)[0], "bad!</s>"),
        ]


def test_preferences_between_plain_texts_need_no_template(chat_config: Callable[..., Config]) -> None:
    records = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}"} for n in range(20)]
    found = segments(ready(chat_config(records, "dpo", chat_template="")))
    assert ("7+1=8", "8</s>") in found and ("7+1=7", "7</s>") in found and len(found) == 40
    place = found.index(("7+1=8", "8</s>"))
    assert found[place + 1] == ("7+1=7", "7</s>") and place % 2 == 0
    with_template = segments(ready(chat_config(records, "dpo")))
    assert ("<|user|>\n7+1=\n<|assistant|>\n8\n", "8</s>") in with_template


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, r"none of messages, conversations \(data\.chat_field\): .*line 3, has the fields text"),
        ({"messages": "a"}, r"line 3, has str where a list of messages is expected"),
        ({"messages": []}, r"line 3, has nothing where a list of messages is expected"),
        ({"messages": chat("a")}, r"line 3, has no turn of the assistant"),
        (
            {"messages": [{"role": "bot", "content": "a"}]},
            r"line 3, message 1: role = 'bot' is none of system, developer",
        ),
        ({"conversations": [{"from": "elf", "value": "a"}]}, r"line 3, message 1: from = 'elf' is none of human, user"),
        ({"messages": [{"content": "a"}]}, r"line 3, message 1 has neither 'role' nor 'from', but content"),
        ({"messages": [{"role": "user"}]}, r"line 3, message 1 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, r"line 3, message 1 has int as its content, not text"),
        ({"messages": chat("a", "b"), "tools": "{"}, r"line 3, tools is not JSON"),
        ({"messages": chat("a\U0010f500", "b")}, r"line 3, has one of the private characters"),
        (
            {"messages": [*chat("a", "b"), {"role": "tool", "content": "no"}]},
            r"line 3,: the chat template does not take it in its line 2: no tools",
        ),
    ],
)
def test_mistakes_in_conversations(chat_config: Callable[..., Config], record: Record, message: str) -> None:
    template = (
        "{% for message in messages %}\n{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ message.role }}:{% generation %}{{ message.content }}{% endgeneration %};{% endfor %}"
    )
    config = chat_config([*conversations(2), record], chat_template=template)
    with pytest.raises(ConfigError, match=message):
        prepare(config, False)
    assert not list(Path(config.data.cache_dir).glob("tokens/*/index.json"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"line 1, has no 'rejected', but the fields chosen, prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, r"line 1, has the same answer as chosen and as rejected"),
        (
            {"chosen": chat("a"), "rejected": chat("b")},
            r"line 1, has the same answer as chosen and as rejected, or none",
        ),
    ],
)
def test_mistakes_in_preferences(chat_config: Callable[..., Config], record: Record, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(chat_config([record], "dpo"), False)


def test_a_template_is_needed_and_read_before_anything_else(chat_config: Callable[..., Config]) -> None:
    for template, message in (
        ("", "data.chat_template is needed"),
        ("{% x %}", r"data\.chat_template is not one: line 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare(chat_config(conversations(2), chat_template=template), False)
    with pytest.raises(ConfigError, match="is a conversation, and there is no chat template"):
        prepare(chat_config([{"chosen": chat("a", "b"), "rejected": chat("a", "c")}], "dpo", chat_template=""), False)


def test_a_run_keeps_the_text_of_its_template(chat_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ 1 }}")
    data = chat_config(conversations(2), chat_template=str(tmp_path / "own.jinja")).data
    assert absolute(data)["chat_template"] == "{{ 1 }}"
    assert "chat_template" not in absolute(dataclasses.replace(data, chat_template="plain"))


def test_whatever_library_read_them_messages_are_the_same() -> None:
    config = replace(Config(), objective={"name": "chat"}, data={"chat_template": "plain", "chat_field": "turns"})
    form = chat_form(config)
    assert form is not None and data_kind(config) == "chat"
    expected = form.document({"turns": chat("a", "b")}, "here")
    columns = {"role": np.array(["user", "assistant"], object), "content": np.array([b"a", b"b"], object)}
    rows = np.array([m | {"tool_calls": None} for m in chat("a", "b")], object)
    assert form.document({"turns": columns}, "here") == form.document({"turns": rows, "tools": []}, "here") == expected
    tools = [{"name": "f"}]
    as_text = form.document({"turns": chat("a", "b"), "tools": json.dumps(tools)}, "here")
    assert (
        json.loads(as_text)["tools"]
        == json.loads(form.document({"turns": rows, "tools": tools}, "here"))["tools"]
        == tools
    )
    assert form.document({"turns": None, "tools": None}, "here") == ""


def test_docstrings_make_conversations() -> None:
    source = (
        'def f():\n    """Adds\n    two.\n\n    More.\n    """\nclass C:\n    """Has f."""\n    def g(self): pass\n'
    )
    found = [[m["content"] for m in record["messages"]] for record in chats.of_docstrings(source, "m.n")]
    assert found == [
        ["What is the function f of m.n for?", "Adds two."],
        ["What is the class C of m.n for?", "Has f."],
    ]
    assert list(chats.of_docstrings("def", "m")) == []


def test_packed_conversations_are_those_of_rows_of_their_own(chat_config: Callable[..., Config]) -> None:
    """Losses and gradients: a conversation is the same whatever stands beside it in its row."""
    config = replace(chat_config(conversations(), sequence_length=128), train={"batch_size": 16})
    model = ModelConfig(vocab_size=260, num_layers=1, width=16, num_heads=2, initial_scale=0.5, scan_layers=False)
    config = replace(config, model=dataclasses.asdict(model))
    split = ready(config).sources[0].train
    rows = [split.window(number) for number in range(4)]
    alone = []
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            alone.append({name: values[here] for name, values in row.items()})
            alone[-1]["segment_ids"] = np.ones(here.sum(), np.int32)
    assert len(rows) < len(alone) <= 16

    def batch_of(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        batch = {name: np.zeros((16, 128), kind) for name, (_, kind) in token_arrays(128).items()}
        for number, row in enumerate(rows):
            for name, values in row.items():
                batch[name][number, : len(values)] = values
        return batch

    network = Transformer(model)
    gradient = jax.jit(make_gradient(config, network))
    params = init_parameters(network, jax.random.key(0))
    (one, told), (other, told_alone) = (gradient(params, batch_of(found), None, 1) for found in (rows, alone))
    np.testing.assert_allclose(told["loss"], told_alone["loss"], rtol=1e-6)
    assert told["tokens"] == told_alone["tokens"] > 0
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)

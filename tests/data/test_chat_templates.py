"""Chat templates: what they write, and which tokens of it the assistant says, against the library transformers."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jinja2")

from transformer.config import Config, ConfigError, replace
from transformer.data import chat_templates, chats
from transformer.data.chat_templates import BUILT_IN, TemplateProblem, chat_of, end_of_turn, find, write
from transformer.data.huggingface_tokenizer import HuggingFaceTokenizer

FOLDER = Path(__file__).parent / "templates"
CONVERSATIONS = json.loads((FOLDER / "conversations.json").read_text())
PUBLISHED = json.loads((FOLDER / "published.json").read_text())
"""What the templates of these models, as published, write of the conversations; None where they refuse."""

SPOKEN = "message['content'] + '<|end|>' }}{% endgeneration %}"
MARKED: dict[str, list[tuple[str, str]]] = {
    "qwen25": [
        (
            "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}",
            "{{- '<|im_start|>' + message.role + '\\n' }}{% if message.role == 'assistant' %}{% generation %}"
            "{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}"
            "{{ '\\n' }}",
        ),
        (
            "{{- '<|im_start|>assistant' }}\n        {%- if message.content %}{{ '\\n' ~ message.content }}{% endif %}",
            "{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content ~ '\\n' if message.content }}",
        ),
        ('{{- \'\\n<tool_call>\\n{"name"', "{{- ('' if loop.first else '\\n') ~ '<tool_call>\\n{\"name\""),
        (
            "{%- endfor %}\n        {{- '<|im_end|>\\n' }}",
            "{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}",
        ),
    ],
    "llama31": [
        (
            "{{- head('assistant') + '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|eot_id|>' }}",
            "{{- head('assistant') }}{% generation %}{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' + "
            "(call.arguments | tojson) + '}<|eot_id|>' }}{% endgeneration %}",
        ),
        (
            "{{- head(message['role']) + message['content'] | trim + '<|eot_id|>' }}",
            "{{- head(message['role']) }}{% if message.role == 'assistant' %}{% generation %}"
            "{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{% else %}"
            "{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}",
        ),
    ],
    "gemma2": [
        (
            "{{- '<start_of_turn>' + speaker + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}",
            "{{- '<start_of_turn>' + speaker + '\\n' }}{% if speaker == 'model' %}{% generation %}"
            "{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{% else %}"
            "{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '\\n' }}",
        )
    ],
    "mistral": [
        (
            "{{- ' ' + message['content'] + eos_token }}",
            "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}",
        ),
        ("{%- else %}\n        {{- raise", "{%- else -%}\n        {{- raise"),
    ],
    "phi35": [
        (
            "{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}",
            "{{- '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}{% generation %}{{ "
            + SPOKEN
            + "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}{{ '\\n' -}}",
        )
    ],
    "zephyr": [
        (
            "{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}",
            "{{- '<|' + message['role'] + '|>\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
            "{{ message['content'] + eos_token }}{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}"
            "{{ '\\n' }}",
        )
    ],
}
"""For each template, what is put into the place of what so that what the assistant writes is marked."""

SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *(
        "<|end_header_id|>",
        "<bos>",
        "<eos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
    ),
    *("<|system|>", "<|endoftext|>", "[INST]", "[/INST]"),
]
PIECES = [
    "Hello",
    " ",
    "\n",
    "ünï",
    "漢字",
    "😀",
    "assistant",
    "user",
    "<|im_end|>",
    "</s>",
    "  ",
    "model\n",
    "x = 1",
    "\t",
    "'s",
]


def template_of(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text()


def marked_template(name: str) -> str:
    """The template with its assistant's words between marks, put in by hand."""
    text = template_of(name)
    for old, new in MARKED[name]:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def names_of(name: str) -> dict[str, str]:
    return {key: PUBLISHED[name][key] for key in ("bos_token", "eos_token")}


def random_chat(seed: int, system: bool) -> list[dict[str, str]]:
    generator = random.Random(seed)

    def content() -> str:
        return "".join(generator.choices(PIECES, k=generator.randrange(0, 8)))

    turns = [
        {"role": role, "content": content()} for _ in range(generator.randrange(1, 4)) for role in ("user", "assistant")
    ]
    return [{"role": "system", "content": content()}, *turns] if system and generator.random() < 0.4 else turns


@cache
def vocabulary() -> str:
    """A byte-level tokenizer that was trained on a few lines, with the special tokens of all the templates."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = [message["content"] or "" for chat in CONVERSATIONS.values() for message in chat["messages"]]
    tokenizer.train_from_iterator([*lines, "assistant user system model\n\n\n" * 9], trainer)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    return tokenizer.to_str()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_templates_write_what_the_published_ones_do(name: str) -> None:
    for case, expected in PUBLISHED[name]["texts"].items():
        chat = CONVERSATIONS[case.removesuffix(" with a prompt")]
        arguments = (
            template_of(name),
            chat["messages"],
            chat.get("tools"),
            names_of(name),
            case.endswith(" with a prompt"),
        )
        if expected is None:
            with pytest.raises(TemplateProblem, match=r"^does not take it in its line \d+: "):
                write(*arguments)
        else:
            assert write(*arguments) == expected, case


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_mask_is_that_of_transformers_token_by_token(name: str) -> None:
    """With marks put into the template, and without any; what it writes stays the same."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    names, plain, marked = names_of(name), template_of(name), marked_template(name)
    reference = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(vocabulary()), **{key: value for key, value in names.items() if value}
    )
    tokenizer = HuggingFaceTokenizer(vocabulary(), settings=names)
    written = {name for name, text in PUBLISHED[name]["texts"].items() if text is not None}
    found = [chat for case, chat in CONVERSATIONS.items() if case in written]
    found += [{"messages": random_chat(seed, name != "gemma2")} for seed in range(25)]
    num_said = 0
    for chat in found:
        messages, tools = chat["messages"], chat.get("tools")
        expected: Any = reference.apply_chat_template(
            messages, tools=tools, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        assert reference.apply_chat_template(
            messages, tools=tools, chat_template=plain, tokenize=False
        ) == reference.decode(expected["input_ids"])
        for template in (plain, marked):
            result = chat_of(template, messages, tools, tokenizer.special_names)
            ids, said = chats.encode(tokenizer, result.text, result.spans)
            assert ids.tolist() == expected["input_ids"]
            assert said.astype(int).tolist() == expected["assistant_masks"]
        num_said += sum(expected["assistant_masks"])
    assert num_said > 200


def test_of_the_plain_templates_every_span_is_an_answer_and_its_end() -> None:
    messages = CONVERSATIONS["long"]["messages"]
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    for name, template in BUILT_IN.items():
        chat = chat_of(template, messages, None, {"bos_token": "<s>", "eos_token": "</s>"})
        end = {"plain": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>"}[name]
        assert end_of_turn(template, (("bos_token", "<s>"), ("eos_token", "</s>"))) == end
        said = [chat.text[first:after] for first, after in chat.spans]
        assert said == [(answer.strip() if name == "llama3" else answer) + end for answer in answers]


LOOP = "{% for message in messages %}{{ message.role + ': ' + message.content + '|' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP + "{{ 'x' if add_generation_prompt }}", "begins a turn of the assistant with 'assistant: '"),
        (LOOP.replace("'|'", "'\n'"), "ends no turn of the assistant, so that none would learn to stop"),
        ("{% for i in range(2) %}{{ messages[i].content }}.{% endfor %}", None),
        ("{{ messages | length }}", "does not write what the assistant says as it is"),
        ("{{ messages[5].content }}", "does not take it in its line 1: list object has no element 5"),
        ("{{ raise_exception('no\nsuch') }}", "does not take it in its line 1: no\nsuch"),
        ("\n{{ 1 / 0 }}", "does not take it in its line 2: ZeroDivisionError: division by zero"),
        ("a\n{% for %}", "is not one: line 2: "),
        ("{{ ''.__class__.__mro__ }}", "does not take it in its line 1: access to attribute '__class__'"),
        ("{% set _ = messages.append(1) %}", "does not take it in its line 1: access to attribute 'append'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        (
            "{% set x %}" + LOOP + "{% endset %}{{ x | length }}",
            "writes something else when its messages are marked",
        ),
    ],
)
def test_what_is_not_exact_or_not_a_template_is_refused(template: str, problem: str | None) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    if problem is None:
        assert chat_of(template, messages).spans == ()
        return
    with pytest.raises(TemplateProblem) as caught:
        chat_of(template, messages)
    assert str(caught.value).startswith(problem)


def test_loops_of_all_sorts_are_followed() -> None:
    """Skipped and left iterations, loops within a turn, a loop variable that is set anew, captured text."""
    template = (
        "{% set text %}{% for message in messages %}{% if message.role == 'system' %}{% continue %}{% endif %}"
        "{% for other in messages %}{% if other.role == 'tool' %}{% break %}{% endif %}{% endfor %}"
        "{% set is_said = message.role == 'assistant' %}{% set message = message.content %}"
        "{{ '<a>' if is_said else '<u>' }}{% for word in message.split(' ') %}{{ word }} {% endfor %}</>{% endfor %}{% endset %}"
        "{{ text }}{{ '<a>' if add_generation_prompt }}"
    )
    roles = ("system", "user", "assistant", "tool", "assistant")
    chat = chat_of(template, [{"role": role, "content": f"of {role}"} for role in roles])
    assert chat.text == "<u>of user </><a>of assistant </><u>of tool </><a>of assistant </>"
    assert [chat.text[first:after] for first, after in chat.spans] == ["of assistant </>"] * 2


def test_a_template_is_found_by_name_by_file_as_text_and_beside_the_tokenizer(tmp_path: Path) -> None:
    def found(**data: Any) -> str:
        return find(replace(Config(), data=data).data)

    (tmp_path / "own.jinja").write_text("{{ 1 }}")
    assert found(chat_template="chatml") == BUILT_IN["chatml"]
    assert found(chat_template=str(tmp_path / "own.jinja")) == found(chat_template="{{ 1 }}") == "{{ 1 }}"
    assert found() == found(tokenizer_path=str(tmp_path / "tokenizer.json")) == ""
    with pytest.raises(ConfigError, match=r"'chatlm' is neither a file nor one of plain.*did you mean chatml"):
        found(chat_template="chatlm")
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "{{ 2 }}"}]}))
    assert found(tokenizer_path=str(tmp_path)) == found(chat_template=str(tmp_path)) == "{{ 2 }}"
    (tmp_path / "chat_template.jinja").write_text("{{ 3 }}")
    assert found(tokenizer_path=str(tmp_path / "tokenizer.json")) == "{{ 3 }}"
    config.write_text("{")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not JSON"):
        found(tokenizer_path=str(tmp_path))


def test_a_tokenizer_keeps_its_template_and_the_names_of_its_ends(tmp_path: Path) -> None:
    plain = HuggingFaceTokenizer(vocabulary())
    assert plain.special_names == {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ 1 }}"}
    tokenizer = HuggingFaceTokenizer(vocabulary(), settings=settings)
    tokenizer.save(tmp_path)
    again = HuggingFaceTokenizer.load(tmp_path, **{"bos_token": "", "eos_token": "<|im_end|>"})
    for found in (tokenizer, again):
        assert found.special_names == {"bos_token": "", "eos_token": "<|im_end|>"} and found.chat_template == "{{ 1 }}"
        assert plain.decode([found.eos]) == "" and found.eos == plain.encode("<|im_end|>")[0]
        assert found.fingerprint == tokenizer.fingerprint != plain.fingerprint
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config == {"kind": "huggingface", "bos_token": "", "eos_token": "<|im_end|>"}


def test_what_templates_are_given() -> None:
    assert write("{{ {'a': '<é>'} | tojson }} {{ dict(b=1) }}", []) == '{"a": "<é>"} {\'b\': 1}'
    assert len(write("{{ strftime_now('%Y-%m-%d') }}", [])) == 10
    assert write("{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}", []) == "TrueTrueFalse"
    assert write("{{ 'content' in messages[0] }}", [{"role": "assistant", "content": None}]) == "False"
    assert chat_templates.compiled("{% generation %}a{% endgeneration %}").render() == "a"


def test_text_tokenizers_know_the_ends_by_name() -> None:
    from transformer.data.plain_tokenizers import ByteTokenizer

    tokenizer = ByteTokenizer()
    ids, said = chats.encode(tokenizer, "<s>é</s>b</s>", [(3, 8)])
    assert ids.tolist() == [tokenizer.bos, *tokenizer.encode("é"), tokenizer.eos, *tokenizer.encode("b"), tokenizer.eos]
    assert said.tolist() == [False, True, True, True, False, False]
    assert np.array_equal(chats.marked(ids, said), 2 * ids + said)

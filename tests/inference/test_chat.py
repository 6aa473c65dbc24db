"""Conversations: `generate --chat` with a model that is asked as it was tuned."""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tiny import build

pytest.importorskip("jinja2")

from transformer.checkpointing import loading
from transformer.checkpointing.run import Run
from transformer.config import Config, ConfigError, replace
from transformer.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.inference import chat, command
from transformer.inference.chat import speech_of
from transformer.inference.command import GenerateOptions
from transformer.inference.generate import generate
from transformer.inference.samples import sample
from transformer.inference.sampling import Sampling
from transformer.inference.text import ends_of
from transformer.parallel.sharding import make_mesh, use_rules

# All prompts but those that are only written have 32 to 63 tokens, so that one program serves them.
CONFIG = replace(
    Config(), objective={"name": "chat"}, data={"chat_template": "plain", "tokenizer": "bytes"}, parallel={"fsdp": 1}
)
TOKENIZER = ByteTokenizer()


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Returns a function from options, and what is typed, to what is printed."""
    model, params = build(3, TOKENIZER.vocab_size)
    monkeypatch.setattr(loading, "load_parameters", lambda *_: (model, params, 0))
    config = replace(CONFIG, model=dataclasses.asdict(model.config))

    def run(typed: str = "", config: Config = config, **options: Any) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        given = GenerateOptions(workdir="x", chat=True, max_tokens=2, temperature=0.0, **options)
        assert command.problems_of(given) == []
        command.write_texts(given, Run(tmp_path, config, TOKENIZER, ""), config, make_mesh(config, jax.devices()[:1]))
        return capsys.readouterr().out

    return run


def answer(prompt: str) -> str:
    """What the model says after a text whose begin is not given again."""
    model, params = build(3, TOKENIZER.vocab_size)
    return spoken(model, params, TOKENIZER, prompt)


def spoken(model: Any, params: Any, tokenizer: Any, prompt: str) -> str:
    """On the mesh of `ask`, so that one program serves both."""
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])), use_rules(CONFIG):
        (found,) = generate(model, params, tokenizer, [prompt], 2, Sampling(0.0))
    return found.text


def test_each_prompt_is_a_user_s_turn(ask: Callable[..., str]) -> None:
    expected = [answer(f"<|system|>\nBe.\n<|user|>\n{text}\n<|assistant|>\n") for text in ("Hi", "You")]
    records = json.loads(ask(prompt=("Hi", "You"), system="Be.", as_json=True, batch_size=1))
    assert [record["text"] for record in records] == expected
    assert [record["prompt"] for record in records] == ["Hi", "You"]
    assert ask(prompt=("Hi",), system="Be.") == expected[0] + "\n"


def test_lines_of_standard_input_are_turns_of_one_conversation(ask: Callable[..., str]) -> None:
    first = answer("<|user|>\nHello u\n<|assistant|>\n")
    second = [*TOKENIZER.encode("<|user|>\nHello u\n<|assistant|>\n" + first), TOKENIZER.eos]
    speech = speech_of(CONFIG, TOKENIZER)
    turns = [
        {"role": "user", "content": "Hello u"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "U"},
    ]
    prompt = speech.prompt(turns)
    tokenizer, stop = speech.tokens([prompt])
    assert stop == () and tokenizer.bos == TOKENIZER.bos and tokenizer.eos == TOKENIZER.eos
    assert tokenizer.encode(prompt).tolist() == [*second, *TOKENIZER.encode("\n<|user|>\nU\n<|assistant|>\n")]
    model, params = build(3, TOKENIZER.vocab_size)
    second_answer = spoken(model, params, tokenizer, prompt)
    assert ask("Hello u\nU\n") == f"{first}\n{second_answer}\n"


def test_an_answer_ends_where_the_template_ends_a_turn() -> None:
    """At a token where the end is one, else at the text."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    library = Tokenizer(
        models.BPE(vocab={c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.add_special_tokens(
        [AddedToken(name, special=True) for name in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")]
    )
    tokenizer = HuggingFaceTokenizer(library.to_str())
    speech = speech_of(replace(CONFIG, data={"chat_template": "chatml"}), tokenizer)
    prompt = speech.prompt([{"role": "user", "content": "Hi"}])
    dressed, stop = speech.tokens([prompt])
    start, end = (tokenizer.encode(name)[0] for name in ("<|im_start|>", "<|im_end|>"))
    assert stop == () and (dressed.bos, dressed.eos) == (start, end)
    assert ends_of(dressed) == (end, tokenizer.eos)
    assert np.append(dressed.bos, dressed.encode(prompt)).tolist() == tokenizer.encode(prompt).tolist()
    plain = speech_of(replace(CONFIG, data={"chat_template": "chatml"}), TOKENIZER)
    dressed, stop = plain.tokens([plain.prompt([{"role": "user", "content": "Hi"}])])
    assert stop == ("<|im_end|>",) and dressed.eos == TOKENIZER.eos


def test_the_template_of_the_tokenizer_is_used_and_its_refusal_told() -> None:
    class Own(ByteTokenizer):
        chat_template = (
            "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}"
        )

    speech = speech_of(replace(CONFIG, data={"chat_template": ""}), Own())
    assert speech.prompt([{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(ConfigError, match=r"the chat template does not take it in its line 1: one only"):
        speech.prompt([{"role": "user", "content": "Hi"}] * 2)
    with pytest.raises(
        ConfigError, match=r"data\.chat_template is needed: the tokenizer of this run has no chat template"
    ):
        speech_of(replace(CONFIG, data={"chat_template": ""}), TOKENIZER)


def test_a_run_s_sample_answers_its_prompt() -> None:
    model, params = build(3, TOKENIZER.vocab_size)
    asked = chat.sample_prompt(CONFIG, TOKENIZER, "Hello you")[0]
    assert asked == "<s><|user|>\nHello you\n<|assistant|>\n"
    with jax.set_mesh(make_mesh(CONFIG, jax.devices()[:1])), use_rules(CONFIG):
        assert sample(CONFIG, model, params, TOKENIZER, "Hello you", 2) is not None


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"chat": True, "beams": 2, "gap": "x"},
            "--chat answers with one model, by drawing, on the console: leave out --beams, --gap",
        ),
        ({"chat": True, "num_samples": 2}, "--num-samples = 2: a conversation goes on with one answer; give --prompt"),
        ({"system": "a"}, "--system = 'a' needs --chat"),
    ],
)
def test_what_is_no_conversation_is_told(options: dict[str, Any], problem: str) -> None:
    assert command.problems_of(GenerateOptions(workdir="x", **options)) == [problem]

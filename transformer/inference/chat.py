"""Conversations with a model that was tuned on them: `transformer generate --chat`."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transformer.config import Config, ConfigError
from transformer.data import chats
from transformer.data.tokenizers import Ids, Tokenizer
from transformer.inference.text import ends_of

if TYPE_CHECKING:
    from transformer.inference.text import Generation

Message = dict[str, Any]


class ChatTokenizer:
    """A tokenizer for prompts that a chat template has written: they bring the token for the begin of a text with them, and a
    text ends where a turn of the assistant does."""

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[str], end: str):
        self._tokenizer = tokenizer
        self.vocab_size, self.fingerprint = tokenizer.vocab_size, tokenizer.fingerprint
        firsts = {int(chats.encode(tokenizer, prompt)[0][0]) for prompt in prompts}
        assert len(firsts) == 1, "all conversations begin alike"
        (self.bos,) = firsts
        ends = chats.encode(tokenizer, end)[0]
        self.is_token = len(ends) == 1 and not tokenizer.decode(ends)
        """Whether the end of a turn is a token of its own; otherwise it is text, at which a generation has to stop."""
        self.eos = int(ends[0]) if self.is_token else tokenizer.eos
        self.more_ends = ends_of(tokenizer)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of a prompt after its first."""
        return chats.encode(self._tokenizer, text)[0][1:]

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(ids)

    def save(self, directory: Path) -> None:
        self._tokenizer.save(directory)


@dataclasses.dataclass(frozen=True)
class Speech:
    """How a model is spoken to: the template, and the names of special tokens that it is told."""

    tokenizer: Tokenizer
    template: str

    def prompt(self, messages: Sequence[Message]) -> str:
        """Returns what the model reads before it answers. Raises ConfigError for what the template does not take."""
        with _told():
            return chats.templates().write(self.template, messages, None, self._names, prompt=True)

    def tokens(self, prompts: Sequence[str]) -> tuple[ChatTokenizer, tuple[str, ...]]:
        """Returns a tokenizer for the prompts, and the strings at which an answer ends besides."""
        with _told():
            end = chats.templates().end_of_turn(self.template, tuple(self._names.items()))
        tokenizer = ChatTokenizer(self.tokenizer, prompts, end)
        return tokenizer, (end,) if end and not tokenizer.is_token else ()

    @property
    def _names(self) -> dict[str, str]:
        return chats.special_names(self.tokenizer)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    problem = chats.templates().TemplateProblem
    try:
        yield
    except problem as error:
        raise ConfigError(f"the chat template {error}") from error


def speech_of(config: Config, tokenizer: Tokenizer) -> Speech:
    """Returns how the model of a run is spoken to. Raises ConfigError where no chat template is known."""
    template = chats.templates().find(config.data) if config.data.chat_template else ""
    template = template or getattr(tokenizer, "chat_template", "")
    if not template:
        raise ConfigError("data.chat_template is needed: the tokenizer of this run has no chat template")
    return Speech(tokenizer, template)


def converse(options: Any, run: Any, config: Config, mesh: Any) -> None:
    """Answers each prompt as a user's turn of a conversation of its own, or, without any, the lines of standard input as the
    turns of one. Raises ConfigError for what only the run shows."""
    import jax

    from transformer.checkpointing.loading import load_parameters
    from transformer.inference.command import in_batches
    from transformer.inference.generate import generate
    from transformer.inference.sampling import Sampling
    from transformer.parallel.sharding import use_rules

    speech = speech_of(run.config, run.tokenizer)
    temperature = 0.8 if options.temperature is None else options.temperature
    sampling = Sampling(temperature, options.top_k, options.top_p, options.min_p, options.repetition_penalty)
    system: list[Message] = [{"role": "system", "content": options.system}] if options.system else []
    with jax.set_mesh(mesh), use_rules(config):
        model, params, _ = load_parameters(run, mesh, options.step, options.best, options.average)

        def answers(asked: Sequence[Sequence[Message]], num_draws: int, on_text: Any = None) -> list["Generation"]:
            prompts = [speech.prompt(messages) for messages in asked]
            tokenizer, ends = speech.tokens(prompts)
            draw = partial(generate, stop=(*options.stop, *ends), seed=config.seed, on_text=on_text)

            def method(prompts: Sequence[str], rows: Any) -> list[list["Generation"]]:
                texts = draw(model, params, tokenizer, prompts, options.max_tokens, sampling, rows=rows)
                return [[text] for text in texts]

            return in_batches(method, tokenizer, prompts, num_draws, options.batch_size)

        if any(options.prompt):
            _print(options, answers([[*system, _user(prompt)] for prompt in options.prompt], options.num_samples))
            return
        messages = system
        for line in sys.stdin:
            messages = [*messages, _user(line.rstrip("\n"))]
            (answer,) = answers([messages], 1, lambda _, piece: print(piece, end="", flush=True))
            print()
            messages = [*messages, {"role": "assistant", "content": answer.text}]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _print(options: Any, texts: Sequence["Generation"]) -> None:
    """Prints the answers to all prompts, whose conversations were the prompts of the texts."""
    asked = [prompt for prompt in options.prompt for _ in range(options.num_samples)]
    if options.as_json:
        records = [
            {"prompt": prompt, "text": text.text, "tokens": text.tokens, "ended": text.ended}
            for prompt, text in zip(asked, texts, strict=True)
        ]
        print(json.dumps(records))
        return
    for number, text in enumerate(texts):
        print(f"--- {number}\n{text.text}" if len(texts) > 1 else text.text)


def problems_of(options: Any) -> list[str]:
    """Returns what of the options has no place in a conversation."""
    problems = []
    names = ("beams", "draft", "gap", "target_prefix", "prompt_file", "output")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
    if options.chat and given:
        problems.append(f"--chat answers with one model, by drawing, on the console: leave out {', '.join(given)}")
    if options.chat and options.num_samples > 1 and not any(options.prompt):
        problems.append(f"--num-samples = {options.num_samples}: a conversation goes on with one answer; give --prompt")
    if options.system and not options.chat:
        problems.append(f"--system = {options.system!r} needs --chat")
    return problems


def sample_prompt(config: Config, tokenizer: Tokenizer, prompt: str) -> tuple[str, Tokenizer, tuple[str, ...]]:
    """Returns the sample's prompt as what a user says, the tokenizer for it, and where its text stops besides."""
    speech = speech_of(config, tokenizer)
    written = speech.prompt([{"role": "user", "content": prompt}])
    return written, *speech.tokens([written])

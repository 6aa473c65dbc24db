"""Prompts as a model reads them: the begin of a text for a decoder, a whole text for an encoder-decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from transformer.config import ConfigError
from transformer.data import files
from transformer.data.tokenizers import PAD, Tokenizer
from transformer.models.transformer import Transformer

SMALLEST_BUCKET = 32


def bucket(length: int) -> int:
    """Returns the number of columns for `length` tokens, so that a program compiled for one length serves others.

    At most a quarter of them stay empty, or 31 of the shorter ones.
    """
    step = max(SMALLEST_BUCKET, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


@dataclass(frozen=True)
class Prompts:
    """Prompts of one batch."""

    batch: dict[str, np.ndarray]
    """What the model's first pass is given, [B, T] and [B, S]."""
    begins: list[Int[np.ndarray, "..."]]
    """The tokens that each row's text begins with."""

    @property
    def width(self) -> int:
        """Number of the decoder's columns."""
        return self.batch["inputs"].shape[1]


def can_generate(model: Transformer) -> bool:
    """Returns whether the model writes text: encoders and classifiers do not."""
    return model.decoder is not None and model.classifier is None


def max_new_tokens(model: Transformer, num_prompt_tokens: int, num_begin_tokens: int = 0) -> int | None:
    """Returns how many tokens may follow a prompt; None: no limit. It is below 0 where the prompt itself is too long.

    The prompt's tokens are counted with the one for its begin, or, of an encoder-decoder, for its end;
    `num_begin_tokens` are those of the text that an encoder-decoder goes on with.
    """
    if model.config.positions != "learned":
        return None
    room = model.config.num_positions or 0
    if model.encoder is None or num_prompt_tokens > room:
        return room - num_prompt_tokens
    return room - 1 - num_begin_tokens


def check_prompts(
    model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], max_tokens: int, begin: str = "", gap: str = ""
) -> None:
    """Raises ConfigError where the model writes no text, where positions are learned and run out, and for a prompt without
    its one gap."""
    if not can_generate(model):
        kind = f"model.num_labels = {model.config.num_labels}, a classifier," if model.classifier else "an encoder"
        raise ConfigError(f"the model cannot generate: {kind} writes no text")
    if begin and model.encoder is None:
        raise ConfigError("only an encoder-decoder begins its texts apart from the prompt: write both in the prompt")
    for prompt in prompts if gap else ():
        if (count := prompt.count(gap)) != 1:
            told = prompt if len(prompt) <= 60 else prompt[:60] + "..."
            raise ConfigError(f"--gap = {gap!r}: must stand once in a prompt, not {count} times as in {told!r}")
    longest = max(len(_ids(tokenizer, prompt, gap)) for prompt in prompts) + 1
    room = max_new_tokens(model, longest, len(tokenizer.encode(begin)))
    if room is not None and max_tokens > room:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_tokens} new ones are more than "
            f"model.num_positions = {model.config.num_positions}, the positions that the model has learned"
        )


def encode_prompts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    prefix: bool = False,
    begin: str = "",
    gap: str = "",
) -> Prompts:
    """Returns the batch of a model's first pass.

    A decoder's prompts end in the same column, after padding; with `prefix` all of a prompt is seen both ways, and one with a
    `gap` is asked for what belongs there. An encoder reads its prompts from the first column on, each up to its end, and
    all of the decoder's texts start with `begin`.
    """
    texts = [_ids(tokenizer, prompt, gap) for prompt in prompts]
    width = bucket(max(map(len, texts)) + 1)
    first = np.array([tokenizer.bos], np.int32)
    if model.encoder is None:
        batch = columns("", [np.append(first, text) for text in texts], width, left=True)
        begins = [np.append(first, tokenizer.encode(prompt.split(gap)[0] if gap else prompt)) for prompt in prompts]
        return Prompts(batch | ({"prefix": batch["segment_ids"] == 1} if prefix else {}), begins)
    sources = [np.append(text, tokenizer.eos).astype(np.int32) for text in texts]
    if model.config.decoder_start_token is not None:
        first = np.array([model.config.decoder_start_token], np.int32)
    begins = [np.concatenate([first, tokenizer.encode(begin)]).astype(np.int32)] * len(texts)
    read = columns("encoder_", sources, width, left=False)
    return Prompts(read | columns("", begins, len(begins[0]), left=True), begins)


def _ids(tokenizer: Tokenizer, prompt: str, gap: str) -> Int[np.ndarray, "..."]:
    if not gap:
        return tokenizer.encode(prompt)
    from transformer.objectives.fill_in_the_middle import question

    before, _, after = prompt.partition(gap)
    return question(tokenizer, tokenizer.encode(before), tokenizer.encode(after))


def columns(name: str, rows: Sequence[np.ndarray], width: int, left: bool) -> dict[str, np.ndarray]:
    """Returns a batch of `width` columns with a text of tokens a row, padding to the `left` or right of it."""
    batch = {f"{name}{kind}": np.zeros((len(rows), width), np.int32) for kind in ("inputs", "positions", "segment_ids")}
    for row, ids in enumerate(rows):
        place = slice(width - len(ids), None) if left else slice(len(ids))
        for array, values in zip(batch.values(), (ids, np.arange(len(ids)), 1), strict=True):
            array[row, place] = values
    return batch


def forbidden_tokens(model: Transformer, tokenizer: Tokenizer) -> Int[np.ndarray, "..."]:
    """Returns the tokens that no text has inside: padding, the begin of a text, and a decoder's marks around a middle."""
    # In a foreign tokenizer 0 may be an ordinary token, and one token may stand for begin and end.
    found = [t for t in (PAD, tokenizer.bos) if t != tokenizer.eos and not tokenizer.decode([t])]
    added = range(tokenizer.vocab_size, model.config.vocab_rows) if model.encoder is None else ()
    return np.array([*found, *added], np.int32)


def batches_by_length(tokenizer: Tokenizer, prompts: Sequence[str], batch_size: int) -> list[list[int]]:
    """Returns the numbers of the prompts in batches of one size, similar lengths together, the longest first; the last
    batch repeats a prompt where too few are left."""
    lengths = [len(tokenizer.encode(prompt)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda number: -lengths[number])
    batch_size = min(batch_size, len(order))
    order += [order[-1]] * (-len(order) % batch_size)
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def read_prompts(path: Path, field: str, errors: str, what: str = "prompt") -> list[str]:
    """Returns the prompts of a file, which may be compressed: one a line, or the `field` of records (.jsonl, .parquet).

    Raises ConfigError for a file that is missing, broken, empty or not UTF-8, and for records without the field; `what`
    they are is part of the options' names.
    """
    flag = "--prompt-file" if what == "prompt" else f"--{what}"
    if not path.is_file():
        raise ConfigError(f"{flag} = '{path}': does not exist, or is no file")
    file = files.TextFile(path.name, path)
    if file.kind in (".jsonl", ".parquet"):
        records = files.read_records(file, [field], errors)
        prompts = [files.text_of(record, field, errors, where, f"--{what}-field") for record, where in records]
    else:
        prompts = list(files.read_lines(file, errors))
    if not prompts:
        raise ConfigError(f"{flag} = '{path}': is empty, so there is nothing to do")
    return prompts

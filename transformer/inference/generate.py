"""Generation with a key and value cache: the prompts in one pass, then a token of every row at a time."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, Int

from transformer.config import ConfigError
from transformer.data.tokenizers import PAD, Tokenizer
from transformer.inference.sampling import sample_logits
from transformer.models.cache import Cache, map_cache
from transformer.models.parameters import Tree
from transformer.models.transformer import MASKED_LOGIT, Transformer, apply, empty_cache
from transformer.parallel.sharding import constrain, replicated

PROMPT_MULTIPLE, CACHE_MULTIPLE = 32, 128
"""Lengths in tokens are rounded up to these, so that programs compiled for one prompt serve others."""


@dataclass(frozen=True)
class Generation:
    """What the model wrote after one prompt."""

    prompt: str
    text: str
    tokens: tuple[int, ...]
    """The new tokens, the end-of-text token left out."""
    ended: bool
    """Whether the model ended the text, rather than the limit of tokens."""


Draw = dict[str, Array]
"""How tokens are drawn: scalars `temperature`, `top_k`, `top_p`, `seed` and `number` (tokens drawn so far in each row),
none of which compiles anything anew, and the tokens that are `forbidden`."""

Step = tuple[Int[Array, "B"], dict[str, Int[Array, "B 1"]], Cache, Draw]
"""Tokens drawn, the same as the next batch, the cache, and how to draw the next."""


def _advance(model: Transformer, params: Tree, batch: dict[str, Array], cache: Cache, draw: Draw) -> Step:
    outputs = apply(model, params, batch, cache=cache)
    logits = outputs.logits(outputs.hidden[:, -1]).at[:, draw["forbidden"]].set(MASKED_LOGIT)
    key = jax.random.key(draw["seed"])

    def row(number: Array, logits: Array) -> Array:
        row_key = jax.random.fold_in(jax.random.fold_in(key, number), draw["number"])
        return sample_logits(logits, row_key, draw["temperature"], draw["top_k"], draw["top_p"])

    tokens = constrain(jax.vmap(row)(jnp.arange(len(logits)), logits), "length")
    assert outputs.cache is not None
    specs = model.cache_specs(*outputs.cache["positions"].shape)
    cache = map_cache(lambda spec, array: constrain(array, *spec.axes), specs, outputs.cache)
    positions = batch["positions"][:, -1:] + 1
    following = {"inputs": tokens[:, None], "positions": positions, "segment_ids": jnp.ones_like(positions)}
    following = {name: constrain(array, "length", "length") for name, array in following.items()}
    return tokens, following, cache, draw | {"number": draw["number"] + 1}


@partial(jax.jit, static_argnames=("model", "cache_length"))
def _prefill(model: Transformer, params: Tree, batch: dict[str, Array], draw: Draw, cache_length: int) -> Step:
    cache = empty_cache(model, len(batch["inputs"]), cache_length)
    return _advance(model, params, batch, cache, draw)


_decode = jax.jit(_advance, static_argnames=("model",), donate_argnames=("cache",))


def generate(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Returns a continuation of each prompt, of `max_tokens` tokens or up to the end of the text.

    What a row draws depends on the seed, its number and its prompt, not on the other rows. `on_text(row, piece)` is
    called with each piece of text as soon as it is whole characters. `params` may lie on one device or on a mesh.
    `sample_logits` says what temperature, `top_k` and `top_p` do. Raises ConfigError where positions are learned and
    run out, and for models that do not continue texts.
    """
    if not can_generate(model):
        architecture = f"model.architecture = {model.config.architecture!r}"
        raise ConfigError(
            f"{architecture}, model.num_labels = {model.config.num_labels}: only a decoder continues texts"
        )
    encoded = [np.concatenate([[tokenizer.bos], tokenizer.encode(prompt)]).astype(np.int32) for prompt in prompts]
    longest = max(map(len, encoded))
    room = max_new_tokens(model, longest)
    if room is not None and max_tokens > room:
        raise ConfigError(
            f"a prompt of {longest} tokens and {max_tokens} new ones are more than "
            f"model.num_positions = {model.config.num_positions}, the positions that the model has learned"
        )
    width = _round_up(longest, PROMPT_MULTIPLE)
    batch = {name: np.zeros((len(prompts), width), np.int32) for name in ("inputs", "positions", "segment_ids")}
    for row, ids in enumerate(encoded):
        batch["inputs"][row, -len(ids) :] = ids
        batch["positions"][row, -len(ids) :] = np.arange(len(ids))
        batch["segment_ids"][row, -len(ids) :] = 1
    # In a foreign tokenizer 0 may be an ordinary token, and one token may stand for begin and end.
    forbidden = [t for t in (PAD, tokenizer.bos) if t != tokenizer.eos and not tokenizer.decode([t])]
    draw = {
        "temperature": np.float32(temperature),
        "top_k": np.int32(top_k),
        "top_p": np.float32(top_p),
        "seed": np.uint32(seed % 2**32),
        "number": np.int32(0),
        "forbidden": np.array(forbidden, np.int32),
    }
    layout = jax.tree.leaves(params)[0].sharding
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    assert not isinstance(mesh, AbstractMesh)
    batch, draw = jax.device_put((batch, draw), layout if mesh is None else replicated(mesh))
    texts = [_Text(tokenizer, ids) for ids in encoded]
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        step = _prefill(model, params, batch, draw, _round_up(width + max_tokens, CACHE_MULTIPLE))
        for number in range(1, max_tokens + 1):
            tokens, batch, cache, draw = step
            # The device is given its next step before it is asked for the result of this one.
            step = _decode(model, params, batch, cache, draw) if number < max_tokens else step
            for row, (text, token) in enumerate(zip(texts, jax.device_get(tokens), strict=True)):
                piece = text.add(int(token), last=number == max_tokens)
                if piece and on_text is not None:
                    on_text(row, piece)
            if all(text.ended for text in texts):
                break
    return [
        Generation(prompt, "".join(text.pieces), tuple(text.tokens[len(ids) :]), text.ended)
        for prompt, ids, text in zip(prompts, encoded, texts, strict=True)
    ]


def can_generate(model: Transformer) -> bool:
    """Returns whether a model continues texts: a decoder with a head over the vocabulary."""
    return model.encoder is None and model.classifier is None


def max_new_tokens(model: Transformer, num_prompt_tokens: int) -> int | None:
    """Returns how many tokens may follow a prompt (its first, of the begin of a text, counted); None: no limit."""
    if model.config.positions != "learned":
        return None
    return max(0, (model.config.num_positions or 0) - num_prompt_tokens)


class _Text:
    """The text of one row, decoded token by token, so that a character of several tokens comes out whole."""

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray):
        self.tokenizer = tokenizer
        self.tokens = prompt.tolist()
        self.pieces: list[str] = []
        self.ended = False
        # Tokens from `start` on are decoded; those before `told` are the prompt's or already in `pieces`.
        self.start, self.told = 0, len(self.tokens)

    def add(self, token: int, last: bool) -> str:
        """Returns the new piece of text, empty while a character is incomplete or when the text has ended."""
        if self.ended:
            return ""
        self.ended = token == self.tokenizer.eos
        if not self.ended:
            self.tokens.append(token)
        before = self.tokenizer.decode(self.tokens[self.start : self.told])
        piece = self.tokenizer.decode(self.tokens[self.start :])[len(before) :]
        if piece.endswith("\ufffd") and not (self.ended or last):
            return ""
        self.start, self.told = self.told, len(self.tokens)
        self.pieces.append(piece)
        return piece


def _round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple

"""Generation with a cache: the prompts in one pass, then a compiled loop that draws a token of every row at a time."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from transformer.data.tokenizers import Tokenizer
from transformer.inference.caches import constrained, placing
from transformer.inference.prompts import bucket, check_prompts, encode_prompts, forbidden_tokens
from transformer.inference.sampling import Sampling, key_of, sample_logits
from transformer.inference.text import Generation, Text, ends_of
from transformer.models.cache import Cache
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer, apply, empty_cache
from transformer.parallel.sharding import constrain

TOKENS_BETWEEN_STOPS = 16
"""Tokens that are drawn before the host looks for stop strings in them."""

Draw = dict[str, Array]
"""How tokens are drawn: what `Sampling.arrays` says, the `seed`, the `rows` [B, 2] (numbers of prompt and sample), the
tokens that are `forbidden`, and those that end a text, `ends`. None of their values compiles anything anew."""

State = dict[str, Any]
"""Texts under way: the `cache` of all tokens but the last, the `batch` [B, 1] of the last, the new `tokens` [B, T], their
`number`, which tokens each row has `seen` [B, V], and which rows are `done` [B]."""


def prefill(
    model: Transformer, params: Tree, batch: dict[str, Array], cache_length: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits of the first new token of each row, and a cache with the prompts in it."""
    source_length = batch["encoder_inputs"].shape[1] if "encoder_inputs" in batch else 0
    return extend(model, params, batch, empty_cache(model, len(batch["inputs"]), cache_length, source_length))


def extend(
    model: Transformer, params: Tree, batch: dict[str, Array], cache: Cache
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits after the last token of a batch, and the cache with the batch in it."""
    outputs = apply(model, params, batch, cache=cache)
    assert outputs.cache is not None
    return outputs.logits(outputs.hidden[:, -1]), constrained(model, outputs.cache)


def following(tokens: Array, positions: Array) -> dict[str, Array]:
    """Returns the batch of one new token a row, [B, 1], at their positions."""
    batch = {"inputs": tokens[:, None], "positions": positions, "segment_ids": jnp.ones_like(positions)}
    return {name: constrain(array, "whole", "whole") for name, array in batch.items()}


def tokens_seen(model: Transformer, batch: dict[str, Array]) -> Bool[Array, "B V"]:
    """Returns the tokens of the decoder's texts, the one for the begin left out."""
    is_token = (batch["segment_ids"] != 0) & (batch["positions"] > 0)
    rows, size = jnp.arange(len(is_token))[:, None], model.config.vocab_rows
    seen = jnp.zeros((len(is_token), size), bool)
    return seen.at[rows, jnp.where(is_token, batch["inputs"], size)].set(True, mode="drop")


def is_end(tokens: Array, draw: Draw) -> Array:
    """Returns which tokens end a text."""
    return jnp.any(tokens[..., None] == draw["ends"], axis=-1)


def _drawn(logits: Float[Array, "B V"], state: State, draw: Draw) -> State:
    """Returns the state with a token of each row drawn from its logits."""
    number = state["number"]

    def of_row(row: Array, logits: Array, seen: Array) -> Array:
        return sample_logits(logits, key_of(draw["seed"], row, number), draw, seen)

    tokens = constrain(jax.vmap(of_row)(draw["rows"], logits, state["seen"]), "whole")
    seen = state["seen"].at[jnp.arange(len(tokens)), tokens].set(True)
    texts = jax.lax.dynamic_update_slice(state["tokens"], tokens[:, None], (0, number))
    return state | {
        "batch": following(tokens, state["batch"]["positions"][:, -1:] + 1),
        "tokens": constrain(texts, "whole", "whole"),
        "number": number + 1,
        "seen": constrain(seen, "whole", "whole"),
        "done": constrain(state["done"] | is_end(tokens, draw), "whole"),
    }


@partial(jax.jit, static_argnames=("model", "cache_length"))
def first_tokens(model: Transformer, params: Tree, batch: dict[str, Array], draw: Draw, cache_length: int) -> State:
    logits, cache = prefill(model, params, batch, cache_length)
    size, width = batch["inputs"].shape
    state = {
        "cache": cache,
        "batch": batch,
        "tokens": jnp.zeros((size, cache_length - width), jnp.int32),
        "number": jnp.int32(0),
        "seen": tokens_seen(model, batch),
        "done": jnp.zeros(size, bool),
    }
    return _drawn(logits, state, draw)


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def further_tokens(model: Transformer, params: Tree, state: State, draw: Draw, limit: Array) -> State:
    """Returns the state when `limit` tokens are drawn, or all rows are done."""

    def step(state: State) -> State:
        logits, cache = extend(model, params, state["batch"], state["cache"])
        return _drawn(logits, state | {"cache": cache}, draw)

    return jax.lax.while_loop(lambda state: (state["number"] < limit) & ~jnp.all(state["done"]), step, state)


def how_to_draw(
    model: Transformer, tokenizer: Tokenizer, sampling: Sampling, seed: int, rows: Sequence[tuple[int, int]]
) -> dict[str, np.generic | np.ndarray]:
    """Returns a `Draw` in NumPy."""
    numbers = {
        "seed": np.uint32(seed % 2**32),
        "rows": np.array(rows, np.int32),
        "ends": np.array(ends_of(tokenizer), np.int32),
    }
    return sampling.arrays() | numbers | {"forbidden": forbidden_tokens(model, tokenizer)}


def generate(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefix: bool = False,
    begin: str = "",
    gap: str = "",
    rows: Sequence[tuple[int, int]] | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Returns a text for each prompt, of `max_tokens` new tokens or up to its end or a `stop` string.

    A decoder continues its prompts; with `prefix`, for models of objective `prefix_lm`, it sees them both ways. An
    encoder-decoder reads them and writes about each a text that goes on after `begin`. With a `gap`, for models of objective
    `fill_in_the_middle`, it writes what stands in the place of that mark in each prompt. What a row draws depends on the
    seed, its prompt, and its numbers in `rows` (of prompt and sample; (0, 0), (1, 0), … if left out), not on the other
    rows. `on_text(row, piece)` is called with each piece of text as soon as it is whole characters and sure to stay.
    `params` may lie on one device or on a mesh. Raises ConfigError as `check_prompts` does.
    """
    check_prompts(model, tokenizer, prompts, max_tokens, begin, gap)
    encoded = encode_prompts(model, tokenizer, prompts, prefix=prefix, begin=begin, gap=gap)
    draw = how_to_draw(model, tokenizer, sampling, seed, rows or [(row, 0) for row in range(len(prompts))])
    texts = [Text(tokenizer, ids, stop) for ids in encoded.begins]
    stride = 1 if on_text is not None else TOKENS_BETWEEN_STOPS if stop else max_tokens
    with placing(params) as put:
        draw = put(draw)
        state = first_tokens(model, params, put(encoded.batch), draw, bucket(encoded.width + max_tokens))
        for start in range(0, max_tokens, stride):
            limit = min(start + stride, max_tokens)
            state["done"] = put(np.array([text.ended for text in texts])) if start else state["done"]
            state = further_tokens(model, params, state, draw, put(np.int32(limit)))
            for row, tokens in enumerate(jax.device_get(state["tokens"])[:, start:limit].tolist()):
                piece = texts[row].add(tokens, last=limit == max_tokens)
                if piece and on_text is not None:
                    on_text(row, piece)
            if all(text.ended for text in texts):
                break
    return [text.generation(prompt) for text, prompt in zip(texts, prompts, strict=True)]

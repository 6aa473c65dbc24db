"""Beam search: the most probable texts, up to a penalty on short ones, instead of drawn ones."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.data.tokenizers import Tokenizer
from transformer.inference.caches import constrained, lengthened, placing, reordered, repeated
from transformer.inference.generate import extend, following, prefill
from transformer.inference.prompts import SMALLEST_BUCKET, bucket, check_prompts, encode_prompts, forbidden_tokens
from transformer.inference.text import Generation, Text, ends_of
from transformer.models.cache import Cache
from transformer.models.parameters import Tree
from transformer.models.transformer import MASKED_LOGIT, Transformer
from transformer.parallel.sharding import constrain

Beams = dict[str, Array]
"""A search over K beams of B prompts: `scores` [B, K] (sums of log-probabilities) and `tokens` [B, K, T] of open beams;
of the N best finished texts `best_scores` (over the penalty), `best_tokens`, `best_length` and whether they `best_ended`;
the `number` of tokens so far, and which prompts are `done` [B]."""

Settings = dict[str, Array]
"""The `limit` of tokens, the exponent `alpha` of the penalty, the tokens `ends`, and those that are `forbidden`."""


def length_penalty(length: Any, alpha: Any) -> Any:
    """Returns what the log-probability of a text is divided by (Wu et al. 2016, arXiv:1609.08144, equation 14)."""
    return ((5 + length) / 6) ** alpha


def select(
    logits: Float[Array, "B K V"], beams: Beams, settings: Settings
) -> tuple[Beams, Int[Array, "B K"], Int[Array, "B K"]]:
    """Returns the search a token later, the beam that each of the new ones continues, and its token.

    Of the best continuations, K more than there can be ends, those that end are finished, and the K best of the others stay
    open. At the limit all are finished. A prompt is done when the best that
    its open beams can still reach, with no further loss and the mildest penalty, is no better than its N finished texts.
    """
    batch, width, vocabulary = logits.shape
    number, limit, alpha, done = beams["number"] + 1, settings["limit"], settings["alpha"], beams["done"]
    logits = logits.at[:, :, settings["forbidden"]].set(MASKED_LOGIT)
    # Columns that are no tokens are no continuation, however few tokens there are.
    log_probabilities = jnp.where(logits <= MASKED_LOGIT / 2, -jnp.inf, jax.nn.log_softmax(logits))
    total = (beams["scores"][:, :, None] + log_probabilities).reshape(batch, width * vocabulary)
    scores, chosen = jax.lax.top_k(total, min((1 + len(settings["ends"])) * width, width * vocabulary))
    parents, tokens = chosen // vocabulary, (chosen % vocabulary).astype(jnp.int32)
    texts = jnp.take_along_axis(beams["tokens"], parents[:, :, None], axis=1)
    texts = jax.lax.dynamic_update_slice(texts, tokens[:, :, None], (0, 0, number - 1))
    is_end = jnp.any(tokens[..., None] == settings["ends"], axis=-1)

    # The old ones come first, so that of equals the earlier stays.
    finished = jnp.where(is_end | (number == limit), scores / length_penalty(number, alpha), -jnp.inf)
    found = {"scores": finished, "tokens": texts, "ended": is_end, "length": jnp.full_like(tokens, number)}
    pool = {name: jnp.concatenate([beams[f"best_{name}"], new], axis=1) for name, new in found.items()}
    _, kept = jax.lax.top_k(pool["scores"], beams["best_scores"].shape[1])
    best = {f"best_{name}": jnp.take_along_axis(array, _like(array, kept), axis=1) for name, array in pool.items()}
    best = {name: jnp.where(_like(new, done[:, None]), beams[name], new) for name, new in best.items()}

    open_scores, places = jax.lax.top_k(jnp.where(is_end, -jnp.inf, scores), width)
    parents, tokens = (jnp.take_along_axis(array, places, axis=1) for array in (parents, tokens))
    bound = open_scores[:, 0] / length_penalty(limit, alpha)
    new = {
        "scores": open_scores,
        "tokens": jnp.take_along_axis(texts, places[:, :, None], axis=1),
        "number": number,
        "done": done | (best["best_scores"][:, -1] >= bound) | (number == limit),
    }
    return beams | best | new, parents, tokens


def _like(array: Array, index: Array) -> Array:
    """Returns an index [B, N] with as many dimensions as `array`."""
    return index.reshape(*index.shape, *[1] * (array.ndim - 2))


State = tuple[Beams, Cache, dict[str, Array]]
"""A search, the cache [B * K, S], and the next batch [B * K, 1]."""


def _follow(
    logits: Array, beams: Beams, settings: Settings, positions: Array
) -> tuple[Beams, dict[str, Array], Int[Array, "R"]]:
    """Returns the search, the next batch, and which row of the cache each beam continues."""
    batch, width = beams["scores"].shape
    beams, parents, tokens = select(logits.reshape(batch, width, -1), beams, settings)
    beams = {name: constrain(array, *["whole"] * array.ndim) for name, array in beams.items()}
    rows = (parents + width * jnp.arange(batch)[:, None]).reshape(-1)
    return beams, following(tokens.reshape(-1), positions), rows


@partial(jax.jit, static_argnames=("model", "num_beams", "num_best", "room", "cache_length"))
def _begin(
    model: Transformer,
    params: Tree,
    batch: dict[str, Array],
    settings: Settings,
    num_beams: int,
    num_best: int,
    room: int,
    cache_length: int,
) -> State:
    size = len(batch["inputs"])
    logits, cache = prefill(model, params, batch, cache_length)
    beams = {
        # All beams are the same at first, so that all but one are closed.
        "scores": jnp.broadcast_to(jnp.where(jnp.arange(num_beams) == 0, 0.0, -jnp.inf), (size, num_beams)),
        "tokens": jnp.zeros((size, num_beams, room), jnp.int32),
        "best_scores": jnp.full((size, num_best), -jnp.inf),
        "best_tokens": jnp.zeros((size, num_best, room), jnp.int32),
        "best_ended": jnp.zeros((size, num_best), bool),
        "best_length": jnp.zeros((size, num_best), jnp.int32),
        "number": jnp.int32(0),
        "done": jnp.zeros(size, bool),
    }
    positions = jnp.repeat(batch["positions"][:, -1:] + 1, num_beams, axis=0)
    beams, first, _ = _follow(jnp.repeat(logits, num_beams, axis=0), beams, settings, positions)
    return beams, constrained(model, repeated(model, cache, num_beams)), first


@partial(jax.jit, static_argnames=("model",), donate_argnames=("state",))
def _go_on(model: Transformer, params: Tree, state: State, settings: Settings) -> State:
    """Returns the state when the search is over, or no column of the cache is left."""

    def is_open(state: State) -> Array:
        beams, cache, _ = state
        return ~jnp.all(beams["done"]) & (cache["index"] < cache["positions"].shape[1])

    def step(state: State) -> State:
        beams, cache, batch = state
        logits, cache = extend(model, params, batch, cache)
        beams, batch, rows = _follow(logits, beams, settings, batch["positions"] + 1)
        return beams, constrained(model, reordered(model, cache, rows)), batch

    return jax.lax.while_loop(is_open, step, state)


_lengthen = jax.jit(lengthened, static_argnames=("model", "length"))


def beam_search(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    *,
    num_beams: int,
    alpha: float = 0.0,
    num_best: int = 1,
    prefix: bool = False,
    begin: str = "",
    gap: str = "",
) -> list[list[Generation]]:
    """Returns for each prompt the `num_best` texts with the highest scores that `num_beams` beams find, best first.

    A text has up to `max_tokens` tokens, its end included; the limit ends those that are open. A score is the
    log-probability of a text over `length_penalty` of the number of its tokens; `alpha` must not be negative, 0 means no
    penalty. The search stops when no open beam can reach a better score. There are fewer texts only where there are no
    more. Prompts are read as by `generate`, and the same mistakes raise ConfigError.
    """
    assert 1 <= num_best <= num_beams and alpha >= 0
    check_prompts(model, tokenizer, prompts, max_tokens, begin, gap)
    encoded = encode_prompts(model, tokenizer, prompts, prefix=prefix, begin=begin, gap=gap)
    settings = {
        "limit": np.int32(max_tokens),
        "alpha": np.float32(alpha),
        "ends": np.array(ends_of(tokenizer), np.int32),
        "forbidden": forbidden_tokens(model, tokenizer),
    }
    # Each step attends to, and moves, every column that there is room for: the cache begins short.
    length, longest = bucket(encoded.width + SMALLEST_BUCKET), bucket(encoded.width + max_tokens)
    with placing(params) as put:
        settings = put(settings)
        sizes = (num_beams, num_best, bucket(max_tokens), min(length, longest))
        state = _begin(model, params, put(encoded.batch), settings, *sizes)
        while True:
            state = _go_on(model, params, state, settings)
            if length >= longest or np.all(jax.device_get(state[0]["done"])):
                break
            length = min(bucket(length + length // 2), longest)
            state = (state[0], _lengthen(model, state[1], length), state[2])
        best = jax.device_get({name: array for name, array in state[0].items() if name.startswith("best_")})

    def generation(row: int, place: int) -> Generation:
        text = Text(tokenizer, encoded.begins[row])
        tokens = best["best_tokens"][row, place, : best["best_length"][row, place]]
        text.add(tokens.tolist(), last=True)
        assert text.ended == best["best_ended"][row, place]
        return text.generation(prompts[row], float(best["best_scores"][row, place]))

    found = np.isfinite(best["best_scores"])
    return [[generation(row, place) for place in np.flatnonzero(found[row]).tolist()] for row in range(len(prompts))]

"""Speculative decoding: a small model proposes tokens, the large one judges several of them in one pass.

Leviathan et al. 2023 (arXiv:2211.17192); Chen et al. 2023 (arXiv:2302.01318).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from transformer.config import ConfigError
from transformer.data.tokenizers import Tokenizer
from transformer.inference.caches import can_rewind, placing, rewound, row_by_row
from transformer.inference.generate import TOKENS_BETWEEN_STOPS, Draw, how_to_draw, is_end, prefill, tokens_seen
from transformer.inference.prompts import bucket, check_prompts, encode_prompts
from transformer.inference.sampling import Sampling, kept_logits, key_of, sample_logits
from transformer.inference.text import Generation, Text
from transformer.models.cache import Cache
from transformer.models.parameters import Tree
from transformer.models.transformer import MASKED_LOGIT, Transformer, apply

Models = tuple[Transformer, Transformer]
"""The one that writes and its draft; their parameters, and what belongs to each, come in the same order."""

State = dict[str, Any]
"""Rows under way, each array with a leading dimension for them: both `caches`, of all tokens but the `last`, whose
`position` it is; the new `tokens` [T] and their `count`; those `seen` [V]; the row's numbers (`row`); the `rounds` that it
took and the proposals that were `accepted`; and whether it is `done`."""


@dataclass(frozen=True)
class Acceptance:
    """How well a draft fits."""

    rounds: int
    """Passes over several tokens, of all rows together."""
    accepted: int
    """Tokens of the draft that stayed."""

    @property
    def tokens_per_round(self) -> float:
        """What a pass yields: the tokens that stayed, and one of its own."""
        return 1 + self.accepted / max(1, self.rounds)


def judge(
    draft: Float[Array, "G V"], target: Float[Array, "G+1 V"], proposed: Int[Array, "G"], key: PRNGKeyArray
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Returns how many of the proposed tokens stay, and the token that comes after them.

    `draft` and `target` are logits of the distributions q and p that each token is drawn from, -inf for none. A token x
    stays with probability min(1, p(x) / q(x)); the first that does not is drawn again from max(0, p - q), and after all
    of them one is drawn from p: what comes out is distributed as p (Leviathan et al., appendix A.1).
    """
    accept_key, draw_key = jax.random.split(key)
    p, q = jax.nn.softmax(target), jax.nn.softmax(draft)
    places = jnp.arange(len(proposed))
    accepted = jax.random.uniform(accept_key, places.shape) * q[places, proposed] < p[places, proposed]
    count = jnp.sum(jnp.cumprod(accepted))
    surplus = jnp.maximum(0, p - jnp.concatenate([q, jnp.zeros_like(q[:1])]))[count]
    # Where p and q are the same but for rounding, nothing may be left.
    surplus = jnp.where(jnp.sum(surplus) > 0, surplus, p[count])
    return count, jax.random.categorical(draw_key, jnp.log(surplus)).astype(jnp.int32)


def _logits(
    model: Transformer, params: Tree, batch: dict[str, Array], cache: Cache, size: int
) -> tuple[Float[Array, "T V"], Cache]:
    """Returns the logits of the one row of a batch, of `size` tokens, and the cache."""
    outputs = apply(model, params, batch, cache=cache)
    logits = outputs.logits(outputs.hidden[0])[:, :size]
    assert outputs.cache is not None
    return jnp.pad(logits, ((0, 0), (0, size - logits.shape[1])), constant_values=MASKED_LOGIT), outputs.cache


def _columns(tokens: Array, position: Array, is_token: Bool[Array, "T"] | bool = True) -> dict[str, Array]:
    positions = position + jnp.arange(len(tokens))
    segments = jnp.broadcast_to(jnp.asarray(is_token, jnp.int32), positions.shape)
    return {"inputs": tokens[None], "positions": positions[None], "segment_ids": segments[None]}


def _round(models: Models, params: tuple[Tree, Tree], state: State, draw: Draw, count: int) -> State:
    """Returns the state of one row after the draft has proposed `count` tokens, and the model has judged them."""
    size, position = models[0].config.vocab_rows, state["position"]
    # The number 0 was the first token's.
    propose_key, judge_key = jax.random.split(key_of(draw["seed"], state["row"], state["rounds"] + 1))

    def kept(logits: Array, seen: Array) -> Array:
        return kept_logits(logits, draw, seen)

    def propose(carry: Any, number: Array) -> Any:
        token, cache, seen = carry
        logits, cache = _logits(models[1], params[1], _columns(token[None], position + number), cache, size)
        distribution = kept(logits[0], seen)
        token = jax.random.categorical(jax.random.fold_in(propose_key, number), distribution).astype(jnp.int32)
        return (token, cache, seen.at[token].set(True)), (token, distribution, seen)

    begin = (state["last"], state["caches"][1], state["seen"])
    (_, _, seen), (proposed, q, seen_before) = jax.lax.scan(propose, begin, jnp.arange(count))
    tokens = jnp.concatenate([state["last"][None], proposed])
    logits, judged = _logits(models[0], params[0], _columns(tokens, position), state["caches"][0], size)
    seen_before = jnp.concatenate([seen_before, seen[None]])
    accepted, token = judge(q, jax.vmap(kept)(logits, seen_before), proposed, judge_key)

    # A row that is done stands still, so that it never outgrows its cache.
    places, gained = jnp.arange(count + 1), jnp.where(state["done"], 0, accepted + 1)

    def settled(number: int, read: Cache | None) -> Cache:
        """Returns a cache with the tokens that stay: those after them are unused columns, or, where a layer would not
        forget them, the same cache from before the round reads again what stays, and nothing else."""
        before, model = state["caches"][number], models[number]
        if read is None or not can_rewind(model, read):
            batch = _columns(tokens, position, places < gained)
            _, read = _logits(model, params[number], batch, before, size)
        return rewound(read, before["index"] + gained)

    new = jnp.where(places < accepted, jnp.append(proposed, 0), token)
    ends = is_end(new, draw) & (places <= accepted)
    # What the draft proposed beyond the end of a text, or the limit, is of no use.
    first_end = jnp.where(jnp.any(ends), jnp.argmax(ends) + 1, accepted)
    useful = jnp.minimum(jnp.minimum(accepted, first_end), draw["limit"] - state["count"])
    texts = jax.lax.dynamic_update_slice(state["tokens"], new, (state["count"],))
    total = state["count"] + gained
    return state | {
        # The draft has not read its last proposal.
        "caches": (settled(0, judged), settled(1, None)),
        "last": jnp.where(state["done"], state["last"], token),
        "position": position + gained,
        "tokens": jnp.where(state["done"], state["tokens"], texts),
        "count": total,
        "seen": seen_before[accepted].at[token].set(True),
        "rounds": state["rounds"] + ~state["done"],
        "accepted": state["accepted"] + jnp.where(state["done"], 0, useful),
        "done": state["done"] | jnp.any(ends) | (total >= draw["limit"]),
    }


@partial(jax.jit, static_argnames=("models", "cache_length", "room"))
def _begin(models: Models, params: tuple[Tree, Tree], batches: Any, draw: Draw, cache_length: int, room: int) -> State:
    """Returns the state after the first token, which the model draws as it would alone."""
    read = [prefill(*each, cache_length) for each in zip(models, params, batches, strict=True)]
    (logits, _), batch = read[0], batches[0]
    seen = tokens_seen(models[0], batch)

    def first(row: Array, logits: Array, seen: Array) -> Array:
        return sample_logits(logits, key_of(draw["seed"], row, jnp.int32(0)), draw, seen)

    tokens = jax.vmap(first)(draw["rows"], logits, seen)
    none = jnp.zeros(len(tokens), jnp.int32)
    return {
        "caches": tuple(row_by_row(model, cache) for model, (_, cache) in zip(models, read, strict=True)),
        "last": tokens,
        "position": batch["positions"][:, -1] + 1,
        "tokens": jnp.zeros((len(tokens), room), jnp.int32).at[:, 0].set(tokens),
        "count": none + 1,
        "seen": seen.at[jnp.arange(len(tokens)), tokens].set(True),
        "row": draw["rows"],
        "rounds": none,
        "accepted": none,
        "done": is_end(tokens, draw) | (draw["limit"] <= 1),
    }


@partial(jax.jit, static_argnames=("models", "num_draft_tokens"), donate_argnames=("state",))
def _go_on(
    models: Models, params: tuple[Tree, Tree], state: State, draw: Draw, rounds: Array, num_draft_tokens: int
) -> State:
    """Returns the state after so many rounds, or when all rows are done."""

    def step(carry: Any) -> Any:
        number, state = carry
        return number + 1, jax.vmap(lambda row: _round(models, params, row, draw, num_draft_tokens))(state)

    def is_open(carry: Any) -> Array:
        return (carry[0] < rounds) & ~jnp.all(carry[1]["done"])

    return jax.lax.while_loop(is_open, step, (jnp.int32(0), state))[1]


def check_draft(
    model: Transformer, tokenizer: Tokenizer, draft: Transformer, draft_tokenizer: Tokenizer, num_draft_tokens: int
) -> None:
    """Raises ConfigError for a draft that cannot propose tokens to a model."""
    if tokenizer.fingerprint != draft_tokenizer.fingerprint:
        sizes = f"{draft_tokenizer.vocab_size} tokens, not the {tokenizer.vocab_size} of the model"
        raise ConfigError(f"the draft has another tokenizer, of {sizes}: train it with the model's")
    if model.config.architecture != draft.config.architecture:
        architectures = f"{draft.config.architecture!r} and the model's {model.config.architecture!r}"
        raise ConfigError(f"the draft's model.architecture is {architectures}: both must read prompts in the same way")
    for config in (model.config, draft.config):
        if (
            any(kind.pattern == "window" for kind in (*config.first_kinds, *config.kinds))
            and num_draft_tokens >= config.window
        ):
            window = f"below model.window = {config.window}, the tokens that a layer keeps"
            raise ConfigError(f"--draft-tokens = {num_draft_tokens}: must be {window}")


def speculate(
    models: Models,
    params: tuple[Tree, Tree],
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling,
    *,
    num_draft_tokens: int = 4,
    stop: Sequence[str] = (),
    seed: int = 0,
    prefix: tuple[bool, bool] = (False, False),
    begin: str = "",
    gap: str = "",
    rows: Sequence[tuple[int, int]] | None = None,
) -> tuple[list[Generation], Acceptance]:
    """Returns texts of a model, distributed as those of `generate` and at temperature 0 the same, and what the draft was
    worth.

    `models` are the model and its draft, which `check_draft` has passed and which proposes `num_draft_tokens` at a time.
    Prompts are read as by `generate`; the same mistakes, the draft's too, raise ConfigError.
    """
    check_prompts(models[0], tokenizer, prompts, max_tokens, begin, gap)
    try:
        check_prompts(models[1], tokenizer, prompts, max_tokens, begin, gap)
    except ConfigError as error:
        raise ConfigError([f"the draft: {problem}" for problem in error.problems]) from error
    encoded = [
        encode_prompts(model, tokenizer, prompts, prefix=both_ways, begin=begin, gap=gap)
        for model, both_ways in zip(models, prefix, strict=True)
    ]
    draw = how_to_draw(models[0], tokenizer, sampling, seed, rows or [(row, 0) for row in range(len(prompts))])
    texts = [Text(tokenizer, ids, stop) for ids in encoded[0].begins]
    sizes = bucket(encoded[0].width + max_tokens + num_draft_tokens), bucket(max_tokens + num_draft_tokens)
    told = [0] * len(texts)
    with placing(params[0]) as put:
        draw = put(draw | {"limit": np.int32(max_tokens)})
        state = _begin(models, params, put([part.batch for part in encoded]), draw, *sizes)
        rounds = put(np.int32(TOKENS_BETWEEN_STOPS // (num_draft_tokens + 1) + 1 if stop else max_tokens))
        while True:
            state = _go_on(models, params, state, draw, rounds, num_draft_tokens)
            found, counts, done = jax.device_get((state["tokens"], state["count"], state["done"]))
            counts = np.minimum(counts, max_tokens).tolist()
            for text, row, start, count in zip(texts, found.tolist(), told, counts, strict=True):
                text.add(row[start:count], last=count == max_tokens)
            told = counts
            done = done | [text.ended for text in texts]
            if np.all(done):
                break
            state["done"] = put(done)
        acceptance = Acceptance(*(int(np.sum(jax.device_get(state[name]))) for name in ("rounds", "accepted")))
    return [text.generation(prompt) for text, prompt in zip(texts, prompts, strict=True)], acceptance

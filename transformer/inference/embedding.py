"""A vector for each text: the hidden states of its tokens made one (Reimers & Gurevych 2019, arXiv:1908.10084)."""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from transformer.config import ConfigError
from transformer.data.tokenizers import Tokenizer
from transformer.inference.caches import placing
from transformer.inference.prompts import batches_by_length, bucket, columns
from transformer.models.parameters import Tree, bind
from transformer.models.transformer import Transformer

Pool = Literal["mean", "first", "last", "pooler"]


def tokens_of(model: Transformer, tokenizer: Tokenizer, text: str, max_tokens: int | None = None) -> np.ndarray:
    """Returns what the model reads of a text, as it was trained to: between `bos` and `eos`, for the encoder of a decoder
    before `eos` alone. Of a longer text `max_tokens`, these two among them, are left."""
    begin = [tokenizer.bos] if model.encoder is None or model.decoder is None else []
    room = None if max_tokens is None else max(0, max_tokens - len(begin) - 1)
    return np.array([*begin, *tokenizer.encode(text)[:room].tolist(), tokenizer.eos], np.int32)


@partial(jax.jit, static_argnames=("model", "pool", "normalize"))
def _pooled(model: Transformer, params: Tree, batch: dict[str, Array], pool: str, normalize: bool) -> Array:
    module = bind(model, params)
    is_token = batch["segment_ids"] != 0
    if module.encoder is not None and module.decoder is not None:
        hidden = module.read({f"encoder_{name}": array for name, array in batch.items()}).hidden
        assert hidden is not None
    else:
        hidden = module(batch).hidden
    hidden = hidden.astype(jnp.float32)
    if pool == "mean":
        weights = is_token.astype(jnp.float32)
        vectors = jnp.einsum("bt,btd->bd", weights, hidden) / jnp.sum(weights, axis=1, keepdims=True)
    elif pool == "last":
        vectors = hidden[jnp.arange(len(hidden)), jnp.sum(is_token, axis=1) - 1]
    else:
        vectors = hidden[:, 0]
    if pool == "pooler":
        assert module.pooler is not None
        vectors = module.pooler(vectors)
    if normalize:
        # PyTorch's least length, so that a vector of zeros stays one.
        vectors = vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def embed(
    model: Transformer,
    params: Tree,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pool: Pool = "mean",
    normalize: bool = False,
    max_tokens: int | None = None,
    batch_size: int = 32,
) -> Float[np.ndarray, "texts D"]:
    """Returns a vector for each text: of its last hidden states the mean, the first or the last, or what the pooler makes of
    the first; with `normalize`, of length 1.

    An encoder-decoder's are those of its encoder. `params` may lie on one device or on a mesh. Raises ConfigError for a
    pooler that the model does not have, and for texts that are longer than the positions that it has learned.
    """
    if pool == "pooler" and model.pooler is None:
        raise ConfigError("--pool = 'pooler': the model has none (model.pooler = False)")
    if not texts:
        return np.zeros((0, model.config.width), np.float32)
    ids = [tokens_of(model, tokenizer, text, max_tokens) for text in texts]
    longest, places = max(map(len, ids)), model.config.num_positions or 0
    if model.config.positions == "learned" and longest > places:
        known = f"model.num_positions = {places}, the positions that the model has learned"
        raise ConfigError(
            f"a text of {longest} tokens is longer than {known}: --max-tokens {places} leaves out the rest"
        )
    found = np.zeros((len(texts), model.config.width), np.float32)
    with placing(params) as put:
        for rows in batches_by_length(tokenizer, texts, batch_size):
            chosen = [ids[row] for row in rows]
            batch = columns("", chosen, bucket(max(map(len, chosen))), left=False)
            found[rows] = jax.device_get(_pooled(model, params, put(batch), pool, normalize))
    return found

"""The network: embedding, positions, an encoder, a decoder or both, and the output head.

Vaswani et al. 2017 (arXiv:1706.03762); Radford et al. 2019; Devlin et al. 2019 (arXiv:1810.04805).
"""

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.config import ModelConfig
from transformer.models.blocks import Stack, fold_in
from transformer.models.cache import Cache, CacheSpec, zeros
from transformer.models.feedforward import Auxiliary
from transformer.models.layers import Linear, Norm, as_rows, dropout, materialize, materialize_gradient
from transformer.models.masks import Tokens
from transformer.models.mixers import Context, Memory
from transformer.models.parameters import Tree, bind, normal, parameter
from transformer.models.positions import sinusoidal_positions
from transformer.parallel.sharding import constrain

MASKED_LOGIT = -1e30
"""Logit of the padding columns: nothing in a softmax, and finite, so that no gradient is NaN."""


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives to an objective."""

    hidden: Float[Array, "B T D"]
    """Final hidden states, after the last norm."""
    logits: Callable[[Float[Array, "... D"]], Float[Array, "... V"]]
    """Maps hidden states, all or some of them, to float32 logits over the padded vocabulary, or over labels."""
    auxiliary: dict[str, tuple[Float[Array, ""], Float[Array, ""]]] = field(default_factory=dict)
    """Loss terms of the model's own, each (sum, weight)."""
    statistics: dict[str, tuple[Float[Array, ""], Float[Array, ""]]] = field(default_factory=dict)
    """What the model reports of itself, each (sum, weight)."""
    future: Callable[[Int[Array, "B T"]], tuple[list[Float[Array, "B T D"]], Auxiliary]] | None = None
    """Maps the tokens after each to hidden states that predict the one after those, and so on, and to terms of the blocks
    that made them (`multi_token`)."""
    cache: Cache | None = None
    """The cache with this batch's tokens in it, if one was given."""


class Transformer(nnx.Module):
    """A decoder, an encoder, or an encoder and a decoder that reads it. The parameters of all layers are stacked."""

    def __init__(self, config: ModelConfig):
        assert config.scan_layers is not None, "`for_platform` decides between loop and unrolling"
        self.config = config
        rows = (config.vocab_rows, config.width)
        padding = config.vocab_rows - (config.vocab_size or 0)
        init = normal(config.initial_scale)
        self.embedding = parameter(rows, ("vocab", "embed"), init, "embedding", padding)
        learned = (config.num_positions or 0, config.width)
        is_learned = config.positions == "learned"
        self.positions = parameter(learned, ("positions", "embed"), init, "embedding") if is_learned else None
        types = (config.num_token_types, config.width)
        self.token_types = (
            parameter(types, ("positions", "embed"), init, "embedding") if config.num_token_types else None
        )
        self.embedding_norm = Norm(config) if config.embedding_norm else None
        depth = config.encoder_depth if config.has_decoder else config.num_layers
        first = () if config.has_decoder else config.first_kinds
        encoder = (config, config.encoder_kinds, depth, False, False, first)
        self.encoder = Stack(*encoder) if config.has_encoder else None
        decoder = (config, config.kinds, config.num_layers, True, config.has_encoder, config.first_kinds)
        self.decoder = Stack(*decoder) if config.has_decoder else None
        has_head = not (config.tied_embeddings or config.num_labels)
        self.head = parameter(rows, ("vocab", "embed"), init, "head", padding) if has_head else None
        asks = config.head_transform or config.head_bias or config.pooler
        before = (
            importlib.import_module("transformer.models.heads").make_heads(config, padding) if asks else (None,) * 3
        )
        self.head_transform, self.head_bias, self.pooler = before
        labels = ((config.width, config.num_labels), ("embed", "labels"), config.initial_scale, "head", True)
        self.classifier = Linear(config, *labels) if config.num_labels else None
        self.future = make_future(config) if config.num_future_tokens else None

    def __call__(
        self, batch: Mapping[str, Array], key: PRNGKeyArray | None = None, cache: Cache | None = None
    ) -> Outputs:
        """Runs the network on `inputs`, `positions` and `segment_ids`, each [B, T], and `prefix` and `token_types` if there
        are any; without, all tokens are of type 0.

        An encoder-decoder reads `encoder_inputs`, `encoder_positions` and `encoder_segment_ids`, [B, S], as well; with
        a cache that has read them, it does not need them again. `key` turns dropout on. With a `cache`, the batch
        continues the sequences in it.
        """
        auxiliary: list[Auxiliary] = []
        memory = None
        if self.encoder is not None and self.decoder is not None:
            memory = self.read(batch, cache, fold_in(key, -2), auxiliary)
        tokens = Tokens(batch["positions"], batch["segment_ids"], batch.get("prefix"))
        columns, index = tokens, None
        if cache is not None:
            if tokens.prefix is None and "prefix" in cache:
                tokens = dataclasses.replace(tokens, prefix=jnp.zeros(tokens.positions.shape, bool))
            cache = self._enter(cache, tokens, memory)
            index = cache["index"] - tokens.positions.shape[1]
            columns = Tokens(cache["positions"], cache["segment_ids"], cache.get("prefix"))
        stack = self.encoder if self.decoder is None else self.decoder
        assert stack is not None
        context = Context(tokens, columns, index, memory=memory, causal=stack.causal, **self._angles(tokens.positions))
        x = self._embed(batch["inputs"], tokens.positions, fold_in(key, -1), batch.get("token_types"))
        x, layers, found = stack(x, context, None if cache is None else cache["layers"], key)
        cache = None if cache is None else cache | {"layers": layers}
        terms = [found, *auxiliary]

        def embed(shifted: Array, key: PRNGKeyArray | None) -> Array:
            return self._embed(shifted, tokens.positions, key)

        def future(following: Array) -> tuple[list[Array], Auxiliary]:
            assert self.future is not None
            states, found = self.future(x, following, embed, context, fold_in(key, -3))
            return states, prefixed("future", found)

        return Outputs(
            x,
            self.logits,
            {name: term for part in terms for name, term in part.get("losses", {}).items()},
            {name: term for part in terms for name, term in part.get("statistics", {}).items()},
            future if self.future is not None else None,
            cache,
        )

    def read(
        self,
        batch: Mapping[str, Array],
        cache: Cache | None = None,
        key: PRNGKeyArray | None = None,
        auxiliary: list[Auxiliary] | None = None,
    ) -> Memory:
        """Returns what the decoder reads; adds the encoder's terms, under names of their own, to `auxiliary`."""
        if "encoder_inputs" not in batch:
            assert cache is not None, "without a cache, a decoder needs encoder_inputs"
            return Memory(None, Tokens(cache["memory"]["positions"], cache["memory"]["segment_ids"]))
        assert self.encoder is not None
        tokens = Tokens(batch["encoder_positions"], batch["encoder_segment_ids"])
        with jax.named_scope("encoder"):
            types = batch.get("encoder_token_types")
            x = self._embed(batch["encoder_inputs"], tokens.positions, fold_in(key, -1), types)
            context = Context(tokens, tokens, causal=False, **self._angles(tokens.positions))
            x, _, found = self.encoder(x, context, None, key)
        if auxiliary is not None:
            auxiliary.append(prefixed("encoder", found))
        return Memory(x, tokens)

    def _enter(self, cache: Cache, tokens: Tokens, memory: Memory | None) -> Cache:
        """Returns the cache with the new tokens' places, and the encoder's, in it."""
        index = cache["index"]

        def written(name: str, values: Array) -> Array:
            return jax.lax.dynamic_update_slice(cache[name], values.astype(cache[name].dtype), (0, index))

        entered = {
            "positions": written("positions", tokens.positions),
            "segment_ids": written("segment_ids", tokens.segment_ids),
            "index": index + tokens.positions.shape[1],
        }
        if tokens.prefix is not None:
            blank = jnp.zeros(cache["positions"].shape, bool)
            entered["prefix"] = jax.lax.dynamic_update_slice(cache.get("prefix", blank), tokens.prefix, (0, index))
        if memory is not None:
            places = {"positions": memory.tokens.positions, "segment_ids": memory.tokens.segment_ids}
            entered["memory"] = places
        return cache | entered

    def _angles(self, positions: Int[Array, "B T"]) -> dict[str, Any]:
        if self.config.positions != "rotary":
            return {}
        rotary = importlib.import_module("transformer.models.rotary")
        return jax.tree.map(materialize, rotary.angles_of_layers(positions, self.config))

    def _embed(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        key: PRNGKeyArray | None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        with jax.named_scope("embedding"):
            # Gathering along a split width makes the compiler replicate the result; gather each table's width first.
            table = constrain(self.embedding[...].astype(config.compute_dtype), "vocab", "hidden")
            x = table[tokens]
            scale = config.embedding_scale
            if scale is None:
                # Under muP nothing that multiplies an embedding may grow with the width.
                scale = math.sqrt(config.width / config.width_ratio) if config.positions == "sinusoidal" else 1.0
            x = x if scale == 1 else x * scale
            if self.positions is not None:
                x = x + constrain(self.positions[...].astype(x.dtype), "positions", "hidden")[positions]
            elif config.positions == "sinusoidal":
                x = x + sinusoidal_positions(positions, config.width).astype(x.dtype)
            if self.token_types is not None:
                x = (
                    x
                    + constrain(self.token_types[...].astype(x.dtype), "positions", "hidden")[
                        0 if types is None else types
                    ]
                )
            x = x if self.embedding_norm is None else self.embedding_norm(x)
            return constrain(dropout(x, config.dropout, key), "batch", "residual_length", "hidden")

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns float32 logits over the padded vocabulary; those of padding columns are `MASKED_LOGIT`. A classifier's
        are over its labels."""
        config = self.config
        with jax.named_scope("logits"):
            before = self.head_transform if self.classifier is None else self.pooler
            hidden = hidden if before is None else before(hidden)
            if config.width_ratio != 1 or config.logit_scale != 1:
                scale = 1 if self.classifier is not None else config.logit_scale
                hidden = hidden * (scale / config.width_ratio)
            if self.classifier is not None:
                return self.classifier(hidden.astype(jnp.float32))
            table = (self.embedding if self.head is None else self.head)[...].astype(hidden.dtype)
            logits = jnp.matmul(as_rows(hidden), materialize_gradient(table.T), preferred_element_type=jnp.float32)
            logits = materialize(logits).reshape(*hidden.shape[:-1], -1)
            logits = logits if self.head_bias is None else logits + self.head_bias[...]
            if config.logit_soft_cap:
                logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
            padding = jnp.arange(config.vocab_rows) >= (config.vocab_size or 0)
            return logits if config.vocab_rows == config.vocab_size else jnp.where(padding, MASKED_LOGIT, logits)

    def cache_specs(self, batch_size: int, length: int, source_length: int = 0) -> Cache:
        """Returns the arrays of a cache with room for `length` tokens (S) of each of `batch_size` sequences.

        `source_length` is the number of columns that an encoder-decoder reads.
        """
        assert self.decoder is not None, "an encoder has nothing to remember"

        def places(columns: int) -> Cache:
            spec = CacheSpec((batch_size, columns), ("batch", "length"), jnp.int32)
            return {"positions": spec, "segment_ids": spec}

        specs = places(length) | {"index": CacheSpec((), (), jnp.int32)}
        specs["layers"] = self.decoder.cache_specs(batch_size, length, source_length)
        return specs | ({"memory": places(source_length)} if self.encoder is not None else {})


def prefixed(part: str, terms: Auxiliary) -> Auxiliary:
    """Returns the terms of a part of the model under names that tell them from those of its main stack."""
    return {group: {f"{part}_{name}": term for name, term in found.items()} for group, found in terms.items()}


def make_future(config: ModelConfig) -> Any:
    """Returns the heads for tokens beyond the next; their module is loaded only by models that have them."""
    return importlib.import_module("transformer.models.future").FutureTokens(config)


def empty_cache(model: Transformer, batch_size: int, length: int, source_length: int = 0) -> Cache:
    """Returns the cache of `Transformer.cache_specs`, with nothing in it."""
    return zeros(model.cache_specs(batch_size, length, source_length))


def apply(
    model: Transformer,
    params: Tree,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    cache: Cache | None = None,
) -> Outputs:
    """Returns the model's outputs with parameters `params`: a pure function."""
    return bind(model, params)(batch, key, cache)

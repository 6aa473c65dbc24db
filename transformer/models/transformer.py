"""The decoder-only Transformer (Vaswani et al. 2017, arXiv:1706.03762; Radford et al. 2019)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.config import ModelConfig
from transformer.models.attention import Cache, SelfAttention, Shared, attention_mask
from transformer.models.layers import Linear, Norm, as_rows, dropout, materialize, rotary_angles, sinusoidal_positions
from transformer.models.parameters import Tree, bind, normal, parameter, parameter_specs, stack
from transformer.parallel.sharding import constrain

MASKED_LOGIT = -1e30
"""Logit of the padding columns: nothing in a softmax, and finite, so that no gradient is NaN."""

_ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=True), "relu": jax.nn.relu}
_GATES = {"swiglu": jax.nn.silu, "geglu": partial(jax.nn.gelu, approximate=True)}


@dataclass(frozen=True)
class Outputs:
    """What a forward pass gives to an objective."""

    hidden: Float[Array, "B T D"]
    """Final hidden states, after the last norm."""
    logits: Callable[[Float[Array, "... D"]], Float[Array, "... V"]]
    """Maps hidden states, all or some of them, to float32 logits over the padded vocabulary."""
    auxiliary: dict[str, tuple[Float[Array, ""], Float[Array, ""]]] = field(default_factory=dict)
    """Loss terms of the model's own, each (sum, weight)."""
    cache: Cache | None = None
    """The cache with this batch's tokens in it, if one was given."""


class FeedForward(nnx.Module):
    """The MLP: two linear maps around GELU or ReLU, or a gated one (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.up = Linear(config, (config.width, config.ff_width), ("embed", "mlp"))
        self.gate = Linear(config, (config.width, config.ff_width), ("embed", "mlp")) if config.gated else None
        residual_scale = config.initial_scale / math.sqrt(2 * config.num_layers)
        self.down = Linear(config, (config.ff_width, config.width), ("mlp", "embed"), residual_scale)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        hidden = materialize(constrain(self.up(x), "batch", "length", "mlp"))
        if self.gate is None:
            hidden = _ACTIVATIONS[self.config.activation](hidden)
        else:
            gate = materialize(constrain(self.gate(x), "batch", "length", "mlp"))
            hidden = hidden * _GATES[self.config.activation](gate)
        return self.down(materialize(hidden))


class Block(nnx.Module):
    """Attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.attention_norm = Norm(config)
        self.attention = SelfAttention(config)
        self.feedforward_norm = Norm(config)
        self.feedforward = FeedForward(config)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        shared: Shared,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        rate, pre = self.config.dropout, self.config.norm_placement == "pre"
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        with jax.named_scope("attention"):
            update, cache = self.attention(self.attention_norm(x) if pre else x, shared, cache, layer)
            x = constrain(x + dropout(update, rate, keys[0]), "batch", "length", "hidden")
            x = x if pre else self.attention_norm(x)
        with jax.named_scope("feedforward"):
            update = self.feedforward(self.feedforward_norm(x) if pre else x)
            x = constrain(x + dropout(update, rate, keys[1]), "batch", "length", "hidden")
            x = x if pre else self.feedforward_norm(x)
        return x, cache


class Transformer(nnx.Module):
    """Embedding, positions, a stack of blocks, and the output head. The parameters of all layers are stacked."""

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
        self.layers = stack(Block(config), config.num_layers)
        self.final_norm = Norm(config) if config.norm_placement == "pre" else None
        self.head = None if config.tied_embeddings else parameter(rows, ("vocab", "embed"), init, "matrix", padding)

    def __call__(
        self, batch: Mapping[str, Array], key: PRNGKeyArray | None = None, cache: Cache | None = None
    ) -> Outputs:
        """Runs the network on `inputs`, `positions` and `segment_ids`, each [B, T].

        `key` turns dropout on. With a `cache`, the batch continues the sequences in it.
        """
        config = self.config
        positions, segments = batch["positions"], batch["segment_ids"]
        key_positions, key_segments, index = positions, segments, None
        if cache is not None:
            index = cache["index"]
            key_positions = jax.lax.dynamic_update_slice(cache["positions"], positions, (0, index))
            key_segments = jax.lax.dynamic_update_slice(cache["segment_ids"], segments, (0, index))
            used = {"positions": key_positions, "segment_ids": key_segments, "index": index + positions.shape[1]}
            cache = cache | used
        rotary = None
        if config.positions == "rotary":
            rotary = jax.tree.map(materialize, rotary_angles(positions, config.head_dim, config.rotary_base))
        shared = Shared(attention_mask(positions, key_positions, segments, key_segments), rotary, index)
        with jax.named_scope("embedding"):
            x = self._embed(batch["inputs"], positions)
            x = constrain(dropout(x, config.dropout, _fold(key, config.num_layers)), "batch", "length", "hidden")
        x, cache = self._run_layers(x, shared, cache, key)
        if self.final_norm is not None:
            with jax.named_scope("final_norm"):
                x = self.final_norm(x)
        return Outputs(hidden=x, logits=self.logits, cache=cache)

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        config = self.config
        # Gathering along a split width makes the compiler replicate the result; gather each table's width first.
        table = constrain(self.embedding[...].astype(config.compute_dtype), "vocab", "hidden")
        x = table[tokens]
        if self.positions is not None:
            x = x + constrain(self.positions[...].astype(x.dtype), "positions", "hidden")[positions]
        elif config.positions == "sinusoidal":
            x = x * math.sqrt(config.width) + sinusoidal_positions(positions, config.width).astype(x.dtype)
        return x

    def _run_layers(
        self, x: Float[Array, "B T D"], shared: Shared, cache: Cache | None, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        config = self.config
        block, stacked = self.layers, parameter_specs(self.layers)

        def run(parameters: Tree, x: Any, shared: Shared, cache: Any, layer: Any, key: Any) -> Any:
            return bind(block, parameters)(x, shared, cache, layer, _fold(key, layer))

        if config.remat != "none":
            keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
            policy = keep_dots if config.remat == "dots" else None
            run = jax.checkpoint(run, policy=policy, prevent_cse=not config.scan_layers)
        if config.scan_layers:

            def step(carry: Any, this: Any) -> Any:
                parameters, layer = this
                with jax.named_scope("layer"):
                    return run(parameters, carry[0], shared, carry[1], layer, key), None

            (x, cache), _ = jax.lax.scan(step, (x, cache), (stacked, jnp.arange(config.num_layers)))
        else:
            for layer, parameters in enumerate(unstack(stacked, config.num_layers)):
                with jax.named_scope(f"layer_{layer}"):
                    x, cache = run(parameters, x, shared, cache, jnp.int32(layer), key)
        return x, cache

    def logits(self, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Returns float32 logits over the padded vocabulary; those of padding columns are `MASKED_LOGIT`."""
        config = self.config
        with jax.named_scope("logits"):
            table = (self.embedding if self.head is None else self.head)[...].astype(hidden.dtype)
            logits = jnp.einsum("...d,vd->...v", as_rows(hidden), table, preferred_element_type=jnp.float32)
            logits = materialize(logits).reshape(*hidden.shape[:-1], -1)
            padding = jnp.arange(config.vocab_rows) >= (config.vocab_size or 0)
            return logits if config.vocab_rows == config.vocab_size else jnp.where(padding, MASKED_LOGIT, logits)


def apply(
    model: Transformer,
    params: Tree,
    batch: Mapping[str, Array],
    key: PRNGKeyArray | None = None,
    cache: Cache | None = None,
) -> Outputs:
    """Returns the model's outputs with parameters `params`: a pure function."""
    return bind(model, params)(batch, key, cache)


def _fold(key: PRNGKeyArray | None, number: Any) -> PRNGKeyArray | None:
    return None if key is None else jax.random.fold_in(key, number)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def unstack(tree: Tree, num_layers: int) -> list[Tree]:
    """Splits stacked parameters [L, ...] into one tree a layer.

    The gradient is one concatenation; differentiating L slices would instead add up L arrays of full size.
    """
    return [jax.tree.map(lambda leaf, layer=layer: leaf[layer], tree) for layer in range(num_layers)]


def _unstack_forward(tree: Tree, num_layers: int) -> tuple[list[Tree], None]:
    return unstack(tree, num_layers), None


def _unstack_backward(num_layers: int, _: None, gradients: list[Tree]) -> tuple[Tree]:
    return (jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients),)


unstack.defvjp(_unstack_forward, _unstack_backward)

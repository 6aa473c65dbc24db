"""Blocks and stacks of them: mixing and MLP in alternation, each added to the residual stream."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache, map_cache
from transformer.models.feedforward import Auxiliary, make_feedforward
from transformer.models.layers import Norm, dropout
from transformer.models.mixers import Context, make_bias, make_cross_attention, make_mixer, reads_memory
from transformer.models.parameters import Tree, bind, parameter_specs, stack
from transformer.parallel.sharding import constrain


class Block(nnx.Module):
    """One layer: it mixes tokens, reads the encoder if there is one, and ends with the MLP."""

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int, causal: bool, reads_encoder: bool):
        self.config, self.mixer_reads = config, reads_encoder and reads_memory(config, kind)
        has_input_norm, has_output_norm = (
            config.norm_placement != "output",
            config.norm_placement in ("sandwich", "output"),
        )
        self.mixer_norm = Norm(config) if has_input_norm else None
        self.mixer = make_mixer(config, kind, num_layers, causal, reads_encoder)
        self.cross = make_cross_attention(config, num_layers) if reads_encoder else None
        self.cross_norm = Norm(config) if has_input_norm and self.cross is not None else None
        self.feedforward = make_feedforward(config, kind, num_layers)
        has_norm = self.feedforward is not None and not config.parallel_blocks
        self.feedforward_norm = Norm(config) if has_input_norm and has_norm else None
        self.mixer_output_norm = Norm(config) if has_output_norm else None
        self.cross_output_norm = Norm(config) if has_output_norm and self.cross is not None else None
        self.feedforward_output_norm = Norm(config) if has_output_norm and has_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: Context,
        cache: Cache | None,
        layer: Int[Array, ""] | int,
        key: PRNGKeyArray | None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, Auxiliary]:
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 3))
        auxiliary: Auxiliary = {}
        caches: Cache = {} if cache is None else dict(cache)

        def mix(y: Array) -> Array:
            update, new = self.mixer(y, context, caches.get("mixer"), layer)
            caches.update({} if new is None else {"mixer": new})
            return checkpoint_name(update, "mixer_output")

        def read(y: Array) -> Array:
            assert self.cross is not None
            update, new = self.cross(y, context, caches.get("cross"), layer)
            caches.update({} if new is None else {"cross": new})
            return update

        def feed(y: Array) -> Array:
            assert self.feedforward is not None
            update, found = self.feedforward(y, context)
            auxiliary.update(found)
            return update

        parallel = self.config.parallel_blocks and self.feedforward is not None
        with jax.named_scope("mixer"):
            both = (lambda y: mix(y) + feed(y)) if parallel else mix
            x = self._add(x, both, self.mixer_norm, self.mixer_output_norm, keys[0])
        if self.cross is not None:
            with jax.named_scope("cross"):
                x = self._add(x, read, self.cross_norm, self.cross_output_norm, keys[2])
        if self.feedforward is not None and not parallel:
            with jax.named_scope("feedforward"):
                x = self._add(x, feed, self.feedforward_norm, self.feedforward_output_norm, keys[1])
        return x, None if cache is None else caches, auxiliary

    def _add(
        self,
        x: Float[Array, "B T D"],
        sublayer: Callable[[Array], Array],
        norm: Norm | None,
        output_norm: Norm | None,
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B T D"]:
        config = self.config
        is_post = config.norm_placement == "post"
        update = sublayer(x if is_post or norm is None else norm(x))
        update = update if output_norm is None else output_norm(update)
        update = dropout(update, config.dropout, key)
        if config.residual_scale != 1:
            update = update * config.residual_scale
        x = constrain(x + update if config.residuals else update, "batch", "residual_length", "hidden")
        return norm(x) if is_post and norm is not None else x

    def cache_specs(self, batch_size: int, length: int, source_length: int) -> Cache:
        """Returns what the block remembers, by part."""
        lengths = (length, source_length) if self.mixer_reads else (length,)
        own = {"mixer": self.mixer.cache_specs(batch_size, *lengths)}
        return own | ({} if self.cross is None else {"cross": self.cross.cache_specs(batch_size, source_length)})


class Period(nnx.Module):
    """Blocks of several kinds, one after another, that a stack repeats as if they were one."""

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = nnx.List(blocks)

    def __call__(
        self, x: Array, context: Context, cache: Cache | None, layer: Any, key: PRNGKeyArray | None
    ) -> tuple[Array, Cache | None, Auxiliary]:
        total: Auxiliary = {}
        caches: Cache = {}
        for number, block in enumerate(self.blocks):
            name, block_key = str(number), None if key is None else jax.random.fold_in(key, number)
            x, new, found = block(x, context, None if cache is None else cache[name], layer, block_key)
            caches[name] = new
            total = add_auxiliary(total, found)
        return x, None if cache is None else caches, total

    def cache_specs(self, batch_size: int, length: int, source_length: int) -> Cache:
        blocks = enumerate(self.blocks)
        return {str(number): block.cache_specs(batch_size, length, source_length) for number, block in blocks}


def add_auxiliary(total: Auxiliary, more: Auxiliary) -> Auxiliary:
    """Returns the terms of both, sums and weights of the same name added."""
    joined = {group: dict(terms) for group, terms in total.items()}
    for group, terms in more.items():
        own = joined.setdefault(group, {})
        for name, term in terms.items():
            own[name] = jax.tree.map(jnp.add, own[name], term) if name in own else term
    return joined


class Stack(nnx.Module):
    """A number of blocks whose parameters are stacked, kind by kind, and the norm at their end. `first` are those of the
    blocks before the first period of `kinds`."""

    def __init__(
        self,
        config: ModelConfig,
        kinds: Sequence[LayerKind],
        num_layers: int,
        causal: bool,
        reads_encoder: bool = False,
        first: Sequence[LayerKind] = (),
    ):
        self.config, self.causal = config, causal

        def stacked(kinds: Sequence[LayerKind], count: int) -> Any:
            blocks = [Block(config, kind, num_layers, causal, reads_encoder) for kind in kinds]
            return stack(blocks[0] if len(blocks) == 1 else Period(blocks), count)

        self.num_periods = (num_layers - len(first)) // len(kinds)
        assert self.num_periods * len(kinds) + len(first) == num_layers, "validated"
        self.layers = stacked(kinds, self.num_periods)
        self.num_first = len(first) if len(set(first)) == 1 else 1  # equal ones are one kind several times
        self.first = stacked(first[: len(first) // self.num_first], self.num_first) if first else None
        self.final_norm = None if config.norm_placement == "post" else Norm(config)
        self.bias = make_bias(config, causal)
        self.with_key: Callable[[Any, PRNGKeyArray | None], Any] = lambda layer, key: layer
        """Gives a layer, once it has its parameters, a key for what draws inside its linear maps."""

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B T D"], Cache | None, Auxiliary]:
        context = dataclasses.replace(context, bias=None if self.bias is None else self.bias())
        before, found, rest = None, {}, cache
        if self.first is not None:
            before, rest = (None, None) if cache is None else (cache["first"], cache["rest"])
            specs = parameter_specs(self.first)
            x, before, found = self.run(specs, x, context, before, fold_in(key, -4), module=self.first)
        x, rest, auxiliary = self.run(parameter_specs(self.layers), x, context, rest, key)
        auxiliary = add_auxiliary(found, auxiliary)
        cache = rest if before is None else {"first": before, "rest": rest}
        with jax.named_scope("final_norm"):
            return x if self.final_norm is None else self.final_norm(x), cache, auxiliary

    def run(
        self,
        stacked: Tree,
        x: Array,
        context: Context,
        cache: Cache | None,
        key: PRNGKeyArray | None,
        first: Any = 0,
        module: Any = None,
    ) -> tuple[Array, Cache | None, Auxiliary]:
        """Runs the layers whose parameters are `stacked`, some of the stack's in a row or all, from number `first` on."""
        config, module = self.config, self.layers if module is None else module
        depth = len(jax.tree.leaves(stacked)[0])

        def run(parameters: Tree, x: Any, context: Context, cache: Any, layer: Any, key: Any) -> Any:
            own = fold_in(key, layer)
            return self.with_key(bind(module, parameters), own)(x, context, cache, layer, own)

        run = rematerialized(config, run, prevent_cse=not config.scan_layers)
        if config.scan_layers:

            def step(carry: Any, this: Any) -> Any:
                parameters, layer = this
                with jax.named_scope("layer"):
                    *carry, auxiliary = run(parameters, carry[0], context, carry[1], layer, key)
                    return tuple(carry), auxiliary

            (x, cache), found = jax.lax.scan(step, (x, cache), (stacked, first + jnp.arange(depth)))
            return x, cache, jax.tree.map(lambda values: jnp.sum(values, axis=0), found)
        auxiliary = {}
        for layer, parameters in enumerate(unstack(stacked, depth)):
            with jax.named_scope(f"layer_{layer}"):
                x, cache, found = run(parameters, x, context, cache, jnp.int32(first + layer), key)
                auxiliary = add_auxiliary(auxiliary, found)
        return x, cache, auxiliary

    def cache_specs(self, batch_size: int, length: int, source_length: int) -> Cache:
        """Returns what all layers remember, with a leading dimension for those of one kind."""

        def stacked(layers: Any, count: int) -> Cache:
            specs = layers.cache_specs(batch_size, length, source_length)
            return map_cache(lambda spec: spec.stacked(count), specs)

        rest = stacked(self.layers, self.num_periods)
        return rest if self.first is None else {"first": stacked(self.first, self.num_first), "rest": rest}


def rematerialized(config: ModelConfig, run: Callable[..., Any], prevent_cse: bool = True) -> Callable[..., Any]:
    """Returns `run`, one layer, so that it keeps for its gradient no more than `remat` says."""
    if config.remat == "none":
        return run
    return importlib.import_module("transformer.models.remat").rematerialized(config, run, prevent_cse)


def fold_in(key: PRNGKeyArray | None, number: Any) -> PRNGKeyArray | None:
    """Returns the key of one part of what `key` is for, None without a key."""
    if isinstance(number, int):
        number %= 2**32  # layers count from 0, what is no layer from -1 down, and JAX takes no number below 0
    return None if key is None else jax.random.fold_in(key, number)


def unstack(tree: Tree, num_layers: int) -> list[Tree]:
    """Splits stacked parameters [L, ...] into one tree a layer."""
    leaves, form = jax.tree.flatten(tree)
    return [jax.tree.unflatten(form, layer) for layer in zip(*(_unstack(x, num_layers) for x in leaves), strict=True)]


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _unstack(x: Array, num_layers: int) -> list[Array]:
    """The gradient is one concatenation; differentiating L slices would instead add up L arrays of full size."""
    return [x[layer] for layer in range(num_layers)]


_unstack.defvjp(lambda x, num_layers: (_unstack(x, num_layers), None), lambda num_layers, _, parts: (jnp.stack(parts),))

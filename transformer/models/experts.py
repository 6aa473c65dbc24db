"""A mixture of experts in the place of the MLP: each token passes through a few of many (Shazeer et al. 2017,
arXiv:1701.06538)."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from transformer.config import ModelConfig
from transformer.models.feedforward import Auxiliary
from transformer.models.grouped import collect, dispatch, grouped_product, sort_by_group
from transformer.models.layers import hidden_std, residual_std
from transformer.models.mixers import Context
from transformer.models.mlp import ACTIVATIONS, MLP
from transformer.models.parameters import normal, parameter
from transformer.models.routing import Choices, Router, Scores, capacity, choose_tokens
from transformer.parallel.exchange import Axis, send, send_back
from transformer.parallel.sharding import constrain, partition_spec

Weights = dict[str, Float[Array, "X I O"]]
"""The matrices of all experts by name: `up`, `down` and, if they are gated, `gate`."""


class Experts(nnx.Module):
    """Experts chosen by a router, and some that every token passes through (Dai et al. 2024, arXiv:2401.06066).

    Without a capacity an expert takes all tokens that choose it (Gale et al. 2022, arXiv:2211.15841). With one it takes the
    first of a row, which later tokens cannot displace, and further choices add nothing. Behind a cache none is dropped,
    so that it does not matter how many tokens come at a time. Or experts choose tokens. Padding is routed nowhere, and
    experts have no biases.
    """

    def __init__(self, config: ModelConfig, num_layers: int):
        self.config, self.router = config, Router(config)
        count, width, hidden = config.num_experts, config.width, config.expert_dim
        into, out = normal(hidden_std(config)), normal(residual_std(config, num_layers))
        self.up = parameter((count, width, hidden), ("experts", "embed", "mlp"), into, "matrix")
        gated = config.gated
        self.gate = parameter((count, width, hidden), ("experts", "embed", "mlp"), into, "matrix") if gated else None
        self.down = parameter((count, hidden, width), ("experts", "mlp", "embed"), out, "matrix")
        shared = dataclasses.replace(config, feedforward_width=config.num_shared_experts * hidden, biases=False)
        self.shared = MLP(shared, num_layers) if config.num_shared_experts else None

    def __call__(self, x: Float[Array, "B T D"], context: Context) -> tuple[Float[Array, "B T D"], Auxiliary]:
        config, is_token = self.config, context.tokens.segment_ids != 0
        held = {"up": self.up, "gate": self.gate, "down": self.down}
        weights = {name: matrix[...].astype(x.dtype) for name, matrix in held.items() if matrix is not None}
        found = self.router(x)
        if config.routing == "expert_choice":
            assert not context.causal, "validated: it would tell of later tokens"
            auxiliary = self.router.terms(found, is_token, None)
            y, auxiliary["statistics"]["expert_dropped"] = by_expert_choice(config, weights, x, found, is_token)
        else:
            choices = self.router.choose(found, is_token)
            auxiliary = self.router.terms(found, is_token, choices)
            if config.expert_capacity_factor is None or context.index is not None:
                y = dropless(config, weights, x, choices)
            else:
                y, auxiliary["statistics"]["expert_dropped"] = with_capacity(config, weights, x, choices)
        if config.expert_scale != 1:
            y = y * config.expert_scale
        if self.shared is not None:
            y = y + self.shared(x, context)[0]
        return constrain(y, "batch", "length", "hidden"), auxiliary


Term = tuple[Float[Array, ""], Float[Array, ""]]


def run(
    config: ModelConfig, weights: Weights, rows: Float[Array, "... D"], product: Callable[[Array, Array], Array]
) -> Float[Array, "... D"]:
    """Returns what the experts make of rows, `product` being that of rows with the matrix of their expert."""
    activation = ACTIVATIONS[config.activation]
    made = {
        name: checkpoint_name(product(rows, weights[name]), "feedforward_hidden") for name in weights if name != "down"
    }
    hidden = made["up"] * activation(made["gate"]) if "gate" in made else activation(made["up"])
    return product(hidden, weights["down"])


def combine(rows: Float[Array, "B T K D"], weights: Float[Array, "B T K"]) -> Float[Array, "B T D"]:
    """Returns the weighted sum of what the K experts of each token made of it."""
    return jnp.sum(rows * weights[..., None], axis=2).astype(rows.dtype)


def dropless(
    config: ModelConfig, weights: Weights, x: Float[Array, "B T D"], choices: Choices
) -> Float[Array, "B T D"]:
    """Returns what the experts add to tokens, all choices sorted by expert and multiplied group by group.

    Each device of a mesh sorts the choices of its own rows. Left to the compiler, a sort would gather those of all.
    Where experts are split over devices, each token travels to those that it chose, and back.
    """
    mesh = jax.sharding.get_abstract_mesh()
    dims = ("experts", "mlp")
    over, hidden = partition_spec(dims, (config.num_experts, config.expert_dim), mesh.shape)

    def part(weights: Weights, x: Array, choices: Choices) -> Array:
        tokens, experts = x.reshape(-1, x.shape[2]), choices.experts.reshape(-1, choices.experts.shape[2])
        if over is None:
            made = by_group(config, weights, tokens, experts)
        else:
            made = on_other_devices(config, weights, tokens, experts, over)
        y = combine(made.reshape(*choices.experts.shape, -1), choices.weights)
        return y if hidden is None else jax.lax.psum(y, hidden)

    if mesh.empty or mesh.size == 1:
        return part(weights, x, choices)
    rows = partition_spec(("batch", "length", "hidden"), x.shape, mesh.shape)
    layouts = {name: PartitionSpec(over, None, hidden) for name in weights} | {
        "down": PartitionSpec(over, hidden, None)
    }
    mapped = jax.shard_map(part, in_specs=(layouts, rows, rows), out_specs=rows, check_vma=False)
    return mapped(weights, x, choices)


def places_of(experts: Int[Array, "T K"], count: int) -> tuple[Int[Array, "1 M"], Int[Array, "1 T K"], Int[Array, "X"]]:
    """Returns the choice that each place is for when choices are sorted by expert, the place of each choice, and the
    number of each expert's; `count` experts, and as a choice none."""
    experts = experts[None]
    order, sizes, rank = sort_by_group(experts, count)
    starts = jnp.cumsum(sizes[0]) - sizes[0]
    target = jnp.where(experts < count, jnp.take(starts, experts, mode="clip") + rank, experts.size)
    source = jnp.where(jnp.arange(experts.size) < jnp.sum(sizes), order, experts.size)
    return source, target, sizes[0]


def by_group(
    config: ModelConfig, weights: Weights, x: Float[Array, "T D"], experts: Int[Array, "T K"]
) -> Float[Array, "T K D"]:
    """Returns what the chosen ones of the experts at hand make of each token, zero where none is chosen."""
    source, target, sizes = places_of(experts, len(weights["up"]))
    rows = dispatch(x[None], source, target)[0]
    rows = run(config, weights, rows, lambda rows, matrix: grouped_product(rows, matrix, sizes))
    return collect(rows[None], source, target)[0]


def on_other_devices(
    config: ModelConfig, weights: Weights, x: Float[Array, "T D"], experts: Int[Array, "T K"], axis: Axis
) -> Float[Array, "T K D"]:
    """Does the same where the experts at hand are this device's share of those along a mesh axis.

    However unevenly tokens choose, none is dropped: a device has room for all choices of all n devices of the axis, n
    times what one device makes. `expert_pieces` divides that, at the price of as many rounds, made anew for the gradient.
    """
    size, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)

    def piece(given: tuple[Array, Array]) -> Array:
        source, target, sizes = places_of(given[1], config.num_experts)
        counts = jax.lax.all_gather(sizes, axis).reshape(size, size, -1)  # from, to, expert there
        between = jnp.sum(counts, axis=2)
        rows = dispatch(given[0][None], source, target)[0]
        received: Any = send(rows, between, axis)
        ends = jnp.cumsum(counts[:, here], axis=1)
        chosen = jnp.sum(jnp.arange(len(rows))[None, :, None] >= ends[:, None], axis=2)
        made = by_group(config, weights, received.reshape(-1, x.shape[1]), chosen.reshape(-1, 1))
        back: Any = send_back(made.reshape(received.shape), between, axis)
        return collect(back[None], source, target)[0]

    pieces = math.gcd(config.expert_pieces, len(x))
    if pieces == 1:
        return piece((x, experts))
    split = jax.tree.map(lambda y: y.reshape(pieces, -1, y.shape[1]), (x, experts))
    return jax.lax.map(jax.checkpoint(piece), split).reshape(*experts.shape, -1)


def with_capacity(
    config: ModelConfig, weights: Weights, x: Float[Array, "B T D"], choices: Choices
) -> tuple[Float[Array, "B T D"], Term]:
    """Gives each expert the same number of places in every row, taken in the order of tokens; counts choices without.

    Lepikhin et al. 2020 (arXiv:2006.16668), algorithm 1, but for the order: there, all first choices go before all second
    ones, which lets a token push out what an earlier one has chosen.
    """
    (batch, length, width), count = x.shape, config.num_experts
    room, num_choices = capacity(config, length), choices.experts.shape[2] * length
    order, sizes, rank = sort_by_group(choices.experts, count)
    is_made = choices.experts < count
    is_kept = is_made & (rank < room)
    target = jnp.where(is_kept, choices.experts * room + rank, count * room)
    starts = (jnp.cumsum(sizes, axis=1) - sizes)[:, :, None]
    place = jnp.arange(room)
    source = jnp.take_along_axis(order, (starts + place).reshape(batch, -1), axis=1, mode="clip")
    source = jnp.where((place < sizes[:, :, None]).reshape(batch, -1), source, num_choices)
    rows = dispatch(x, source, target).reshape(batch, count, room, width)
    rows = run_places(config, weights, rows).reshape(batch, -1, width)
    made, kept = (jnp.sum(which, dtype=jnp.float32) for which in (is_made, is_kept))
    return combine(collect(rows, source, target), choices.weights), (made - kept, made)


def by_expert_choice(
    config: ModelConfig, weights: Weights, x: Float[Array, "B T D"], found: Scores, is_token: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Term]:
    """Gives each expert the tokens that it chooses; counts tokens that no expert chose."""
    (batch, length, width), count = x.shape, config.num_experts
    tokens, shares = (y.reshape(batch, -1) for y in choose_tokens(config, found, is_token))
    rows = jnp.take_along_axis(x, tokens[:, :, None], axis=1).reshape(batch, count, -1, width)
    rows = run_places(config, weights, rows).reshape(batch, -1, width)
    weighted = rows.astype(jnp.float32) * shares[:, :, None]
    row = jnp.arange(batch)[:, None]
    y = jnp.zeros(x.shape, jnp.float32).at[row, tokens].add(weighted).astype(x.dtype)
    is_chosen = jnp.zeros((batch, length), bool).at[row, tokens].max(shares > 0)
    dropped = jnp.sum(is_token & ~is_chosen, dtype=jnp.float32)
    return y, (dropped, jnp.sum(is_token, dtype=jnp.float32))


def run_places(config: ModelConfig, weights: Weights, rows: Float[Array, "B X C D"]) -> Float[Array, "B X C D"]:
    """Returns what each expert makes of its places: those of all rows of the batch go to the device of their expert, and
    what it made of them back (Lepikhin et al. 2020, section 3)."""
    at_home, away = ("batch", "places", "places", "hidden"), ("groups", "experts", "places", "hidden")
    rows = constrain(constrain(rows, *at_home), *away)
    rows = run(config, weights, rows, lambda rows, matrix: jnp.einsum("bxci,xio->bxco", rows, matrix))
    return constrain(constrain(rows, *away), *at_home)

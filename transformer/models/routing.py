"""Which experts a token goes to, and what keeps them evenly loaded."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from transformer.config import ModelConfig
from transformer.models.feedforward import Auxiliary
from transformer.models.layers import as_rows, hidden_std
from transformer.models.parameters import normal, parameter, zeros


def capacity(config: ModelConfig, length: int) -> int:
    """Returns how many of a row of `length` tokens an expert takes: a multiple of its even share, rounded up."""
    factor = 1.0 if config.expert_capacity_factor is None else config.expert_capacity_factor
    share = factor * config.experts_per_token * length / config.num_experts
    return min(length, math.ceil(share - 1e-9))  # what rounding added to a whole number is no token


class Scores(NamedTuple):
    """What a router thinks of each token and expert, in float32."""

    logits: Float[Array, "B T X"]
    scores: Float[Array, "B T X"]
    """Softmax or sigmoid of them."""


class Choices(NamedTuple):
    """The K experts of each token; `num_experts` stands for none, which is padding's choice."""

    experts: Int[Array, "B T K"]
    weights: Float[Array, "B T K"]


class Router(nnx.Module):
    """A linear map to a score for each expert."""

    def __init__(self, config: ModelConfig):
        self.config = config
        shape = (config.width, config.num_experts)
        self.kernel = parameter(shape, ("embed", "router"), normal(hidden_std(config)), "matrix")
        self.bias = parameter(shape[1:], ("router",), zeros, "balance") if config.balance_bias_rate else None

    def __call__(self, x: Float[Array, "B T D"]) -> Scores:
        # Rounding would change choices: accelerators multiply float32 in fewer bits unless told not to.
        x = x.astype(jnp.float32)
        logits = jnp.matmul(as_rows(x), self.kernel[...], precision="highest").reshape(*x.shape[:2], -1)
        score = jax.nn.softmax if self.config.router_score == "softmax" else jax.nn.sigmoid
        return Scores(logits, score(logits))

    def choose(self, found: Scores, is_token: Bool[Array, "B T"]) -> Choices:
        """Returns the experts with the highest scores of each token (Shazeer et al. 2017, arXiv:1701.06538).

        The weights of several add up to one; that of a single expert is its score, since otherwise nothing would teach
        the router (Fedus et al. 2021, arXiv:2101.03961, section 2.1). The bias decides who is chosen and has no part in
        the weights (DeepSeek-V3, arXiv:2412.19437, equation 16).
        """
        config, scores = self.config, found.scores
        preferred = scores if self.bias is None else scores + self.bias[...]
        if config.num_expert_groups > 1:
            preferred = within_groups(config, preferred)
        _, experts = jax.lax.top_k(jax.lax.stop_gradient(preferred), config.experts_per_token)
        # A comparison instead of a gather: its gradient is a fused elementwise product and not a scatter.
        weights = jnp.sum(jnp.where(_one_hot(experts, config), scores[:, :, None], 0), axis=-1)
        if config.experts_per_token > 1 and config.normalize_expert_weights:
            weights = weights / _positive(jnp.sum(weights, axis=-1, keepdims=True))
        return Choices(jnp.where(is_token[:, :, None], experts, config.num_experts), weights)

    def terms(self, found: Scores, is_token: Bool[Array, "B T"], choices: Choices | None) -> Auxiliary:
        """Returns losses and statistics; without choices, those that do not depend on what tokens choose.

        `balance_loss`: X sum_e f_e p_e of each row, f being the share of the row's choices that fell on an expert and p
        the mean of its scores, each divided by the sum of its token's (Fedus et al. 2021, equation 4). `router_z_loss`:
        the squared log-partition function of each token (Zoph et al. 2022, arXiv:2202.08906, equation 5). `balance_bias`:
        always zero, but its gradient is how far the load of each expert is above the mean (DeepSeek-V3, section 2.1.2),
        so that microbatches and devices add it up as they do any other. `expert_max_load` is the largest load of a row
        over the mean, `load_entropy` the entropy of f, in nats. Means are over layers and rows, or tokens.
        """
        config, losses = self.config, {}
        per_row = jnp.sum(is_token, axis=1, dtype=jnp.float32)
        tokens, rows = jnp.sum(per_row), jnp.sum(per_row > 0, dtype=jnp.float32)
        if config.router_z_loss:
            squares = jnp.square(jax.nn.logsumexp(found.logits, axis=-1))
            losses["router_z_loss"] = (config.router_z_loss * jnp.sum(jnp.where(is_token, squares, 0)), tokens)
        if choices is None:
            return {"losses": losses, "statistics": {}}
        load = jnp.sum(_one_hot(choices.experts, config), axis=(1, 2), dtype=jnp.float32)
        shares = load / _positive(config.experts_per_token * per_row)[:, None]
        if config.balance_loss:
            scores = found.scores / _positive(jnp.sum(found.scores, axis=-1, keepdims=True))
            mean = jnp.sum(jnp.where(is_token[:, :, None], scores, 0), axis=1) / _positive(per_row)[:, None]
            total = config.num_experts * jnp.sum(shares * mean)
            losses["balance_loss"] = (config.balance_loss * total, rows)
        if self.bias is not None:
            all_choices = config.experts_per_token * tokens
            excess = jnp.sum(load, axis=0) - all_choices / config.num_experts
            zero = (self.bias[...] - jax.lax.stop_gradient(self.bias[...])) * excess
            losses["balance_bias"] = (jnp.sum(zero), all_choices)
        statistics = {
            "expert_max_load": (config.num_experts * jnp.sum(jnp.max(shares, axis=-1)), rows),
            "load_entropy": (-jnp.sum(shares * jnp.log(_positive(shares))), rows),
        }
        return {"losses": losses, "statistics": statistics}


def within_groups(config: ModelConfig, preferred: Float[Array, "B T X"]) -> Float[Array, "B T X"]:
    """Returns the scores with minus infinity for experts of groups that the token does not choose.

    A group, the experts of one machine, counts as much as its best two together (DeepSeek-V3, section 2.1.2, where a token
    has two experts a machine): a token travels to `groups_per_token` machines at most.
    """
    groups = preferred.reshape(*preferred.shape[:2], config.num_expert_groups, -1)
    _, chosen = jax.lax.top_k(jnp.sum(jax.lax.top_k(groups, 2)[0], axis=-1), config.groups_per_token)
    is_chosen = jnp.any(chosen[..., None] == jnp.arange(config.num_expert_groups), axis=2)
    return jnp.where(is_chosen[..., None], groups, -jnp.inf).reshape(preferred.shape)


def choose_tokens(
    config: ModelConfig, found: Scores, is_token: Bool[Array, "B T"]
) -> tuple[Int[Array, "B X C"], Float[Array, "B X C"]]:
    """Returns the tokens of a row that each expert chooses, and their weights, zero for none.

    Expert choice (Zhou et al. 2022, arXiv:2202.09368, section 3.2): the highest scores of each expert, as many as its
    share of the row's tokens, padding left out. Whether a token is chosen depends on later ones.
    """
    length = is_token.shape[1]
    scores = jnp.where(is_token[:, None], found.scores.swapaxes(1, 2), -1)
    weights, tokens = jax.lax.top_k(scores, capacity(config, length))
    limits = jnp.asarray(np.array([capacity(config, count) for count in range(length + 1)]))
    limit = limits[jnp.sum(is_token, axis=1)][:, None, None]
    return tokens, jnp.where((jnp.arange(tokens.shape[2]) < limit) & (weights > 0), weights, 0)


def _one_hot(experts: Int[Array, "B T K"], config: ModelConfig) -> Bool[Array, "B T K X"]:
    return experts[..., None] == jnp.arange(config.num_experts)


def _positive(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns `x`, and 1 where there is nothing to divide by."""
    return jnp.where(x > 0, x, 1)

"""Heads that predict tokens beyond the next, in sequence (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from transformer.config import ModelConfig
from transformer.models.blocks import Block, add_auxiliary, fold_in, rematerialized
from transformer.models.feedforward import Auxiliary
from transformer.models.layers import Linear, Norm
from transformer.models.mixers import Context, make_bias


class FutureToken(nnx.Module):
    """One further token: the hidden state and the token after it, joined, through a block of its own."""

    def __init__(self, config: ModelConfig):
        self.hidden_norm, self.token_norm = Norm(config), Norm(config)
        self.join = Linear(config, (2 * config.width, config.width), ("joined", "embed"))
        self.block = Block(config, config.kinds[-1], config.num_layers, True, False)
        self.final_norm = None if config.norm_placement == "post" else Norm(config)


class FutureTokens(nnx.Module):
    """As many further tokens as `num_future_tokens`; embedding and head are the model's."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.heads = nnx.List([FutureToken(config) for _ in range(config.num_future_tokens)])
        self.bias = make_bias(config, True)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        following: Int[Array, "B T"],
        embed: Callable[[Int[Array, "B T"], PRNGKeyArray | None], Float[Array, "B T D"]],
        context: Context,
        key: PRNGKeyArray | None,
    ) -> tuple[list[Float[Array, "B T D"]], Auxiliary]:
        """Returns for each further token the states from which the model's head predicts it, and the blocks' own terms.

        `following` is the token after each position; the k-th states predict the one k places after that. At the last k
        positions of a row nothing is known to predict from, and what is returned there means nothing.
        """
        context = dataclasses.replace(context, bias=None if self.bias is None else self.bias())
        states, auxiliary = [], {}
        for number, head in enumerate(self.heads):
            with jax.named_scope(f"future_{number}"):
                shifted = jnp.roll(following, -number, axis=1)
                head_key = fold_in(key, number)
                pair = [head.hidden_norm(hidden), head.token_norm(embed(shifted, fold_in(head_key, -1)))]
                joined = head.join(jnp.concatenate(pair, axis=-1))
                run = rematerialized(
                    self.config, lambda x, context, key, block=head.block: block(x, context, None, 0, key)
                )
                hidden, _, found = run(joined, context, head_key)
                states.append(hidden if head.final_norm is None else head.final_norm(hidden))
                auxiliary = add_auxiliary(auxiliary, found)
        return states, auxiliary

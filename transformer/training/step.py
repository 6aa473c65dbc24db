"""The training step: a pure function (state, batch) -> (state, metrics), compiled once."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from transformer.config import Config
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer, apply
from transformer.objectives import Terms, normalize, objective_of
from transformer.optimizers import make_schedule
from transformer.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    config: Config, model: Transformer, optimizer: optax.GradientTransformation, shardings: TrainState | None = None
) -> TrainStep:
    """Returns the step for `config`; `shardings` pin the gradients to the layout of their parameters."""
    schedule = make_schedule(config)
    gradient = make_gradient(config, model, None if shardings is None else shardings.params)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if config.model.dropout else None
        gradients, metrics = gradient(state.params, batch, key)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            rate = jnp.asarray(schedule(state.step), jnp.float32)
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
            finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"])

            def keep(new: Any, old: Any) -> Any:
                return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

            skipped = jnp.where(finite, 0, state.nonfinite_steps + 1)
            state = TrainState(state.step + 1, keep(params, state.params), keep(opt_state, state.opt_state), skipped)
        metrics |= {"gradient_norm": norm, "learning_rate": rate, "nonfinite_steps": skipped}
        return state, metrics

    return train_step


def make_terms(config: Config, model: Transformer) -> Callable[..., Terms]:
    """Returns the function from (params, batch, dropout key) to the objective's terms."""
    terms = objective_of(config).terms
    return lambda params, batch, key=None: terms(config.objective, apply(model, params, batch, key), batch)


def make_gradient(
    config: Config, model: Transformer, layout: Any = None
) -> Callable[[Tree, Batch, Array | None], tuple[Tree, Metrics]]:
    """Returns the function from (params, batch, dropout key) to the batch's gradient and metrics.

    The batch may be split into microbatches whose gradients are summed. Each term of the loss is divided by its
    weight in the whole batch, so that the sum is the gradient of the whole however unevenly the weights fall.
    """
    terms_of = make_terms(config, model)
    parts = config.train.num_microbatches

    def part_loss(params: Tree, batch: Batch, key: Array | None, weights: Any) -> tuple[Array, Any]:
        terms = terms_of(params, batch, key)
        loss, means = normalize(terms.losses, weights)
        return loss, (means, terms.statistics)

    def pin(gradients: Tree) -> Tree:
        return gradients if layout is None else jax.lax.with_sharding_constraint(gradients, layout)

    def gradient(params: Tree, batch: Batch, key: Array | None) -> tuple[Tree, Metrics]:
        differentiate = jax.value_and_grad(part_loss, has_aux=True)
        if parts == 1:
            (loss, (means, statistics)), gradients = differentiate(params, batch, key, None)
            gradients = pin(gradients)
        else:
            # Only the weights are used, so the compiler drops the forward pass that this seems to cost.
            statistics = jax.eval_shape(lambda *inputs: terms_of(*inputs).statistics, params, batch)
            weights = {name: weight for name, (_, weight) in terms_of(params, batch).losses.items()}

            def accumulate(total: Any, this: Any) -> tuple[Any, None]:
                number, part = this
                part_key = None if key is None else jax.random.fold_in(key, number)
                (loss, (means, statistics)), gradients = differentiate(params, part, part_key, weights)
                return jax.tree.map(jnp.add, total, (pin(gradients), loss, means, statistics)), None

            # Part m takes rows m, m + M, ...: each device keeps the rows that it holds.
            split = {n: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for n, x in batch.items()}
            zero = (params, jnp.zeros(()), {name: jnp.zeros(()) for name in weights}, statistics)
            zero = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), zero)
            (gradients, loss, means, statistics), _ = jax.lax.scan(accumulate, zero, (jnp.arange(parts), split))
        reported = means | (normalize(statistics)[1] if statistics else {})
        return gradients, {"loss": loss, **reported, "tokens": jnp.sum(batch["weights"] > 0)}

    return gradient

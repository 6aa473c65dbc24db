"""The training step: a pure function (state, batch) -> (state, metrics), compiled once."""

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from transformer.config import Config, microbatch_starts
from transformer.models.parameters import Tree, divide, join, parameter_specs
from transformer.models.transformer import Transformer, apply
from transformer.objectives import Terms, normalize, objective_of
from transformer.optimizers import gradient_norm, make_schedule, put_back, trained_part
from transformer.parallel.sharding import batch_sharding, replicated
from transformer.training.state import TrainState

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    config: Config,
    model: Transformer,
    optimizer: optax.GradientTransformationExtraArgs,
    shardings: TrainState | None = None,
) -> TrainStep:
    """Returns the step for `config`; `shardings` pin the gradients to the layout of their parameters."""
    schedule, starts, trained = (
        make_schedule(config),
        microbatch_starts(config),
        functools.partial(trained_part, config),
    )
    specs, _ = divide(parameter_specs(model), parameter_specs(model))
    layout = None if shardings is None else shardings.params
    if config.parallel.shard_optimizer and shardings is not None:
        layout = importlib.import_module("transformer.parallel.moments").split_all(layout, specs)
    gradient = make_gradient(config, model, layout)
    draws = config.model.dropout or config.adapter.dropout
    near = None
    if config.parallel.offload_optimizer:
        assert shardings is not None, "they tell where the moments are brought from"
        near = jax.tree.map(lambda layout: layout.with_memory_kind("device"), shardings.opt_state)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if draws else None
        # While the batch grows, the number of its microbatches is known to the device alone.
        parts = jnp.sum(state.step >= jnp.asarray(starts)) if starts[-1] else len(starts)
        gradients, metrics = gradient(state.params, batch, key, parts, state.frozen)
        with jax.named_scope("optimizer"):
            norm = gradient_norm(gradients, trained(specs))
            rate = jnp.asarray(schedule(state.step), jnp.float32)
            opt_state = state.opt_state if near is None else jax.device_put(state.opt_state, near)
            updates, new_opt_state = optimizer.update(gradients, opt_state, state.params, rate=rate)
            params = put_back(optax.apply_updates(trained(state.params), updates), state.params)
            finite = jnp.isfinite(optax.tree.norm(gradients)) & jnp.isfinite(metrics["loss"])

            def keep(new: Any, old: Any) -> Any:
                return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

            skipped = jnp.where(finite, 0, state.nonfinite_steps + 1)
            state = TrainState(
                state.step + 1, keep(params, state.params), keep(new_opt_state, opt_state), skipped, state.frozen
            )
        metrics |= {"gradient_norm": norm, "learning_rate": rate, "nonfinite_steps": skipped}
        return state, metrics

    return train_step


def compile_step(step: TrainStep, state: TrainState, batch: Mapping[str, Any], layout: TrainState, mesh: Mesh) -> Any:
    """Compiles the step ahead of time for a state and a batch, or their shapes; a call gives its state away."""
    rows, whole = {name: batch_sharding(mesh) for name in batch}, replicated(mesh)
    jitted = jax.jit(step, in_shardings=(layout, rows), out_shardings=(layout, whole), donate_argnums=0)
    return jitted.lower(state, batch).compile()


def make_terms(config: Config, model: Transformer) -> Callable[..., Terms]:
    """Returns the function from (params, batch, dropout key) to the objective's terms."""
    terms = objective_of(config).terms
    return lambda params, batch, key=None: terms(config.objective, apply(model, params, batch, key), batch)


def make_gradient(config: Config, model: Transformer, layout: Any = None) -> Callable[..., tuple[Tree, Metrics]]:
    """Returns the function from (params, batch, dropout key, microbatches, frozen parameters) to the batch's gradient, that of
    what is trained, and metrics.

    The batch may be split into microbatches whose gradients are summed. Each term of the loss is divided by its
    weight in the whole batch, so that the sum is the gradient of the whole however unevenly the weights fall. All parts
    count, unless a number of them is given, an int32 scalar; those beyond have to be padding.
    """
    if config.parallel.stage != 1:
        return importlib.import_module("transformer.training.pipeline").make_gradient(config, model, layout)
    terms_of, trained = make_terms(config, model), functools.partial(trained_part, config)
    parts = config.train.num_microbatches

    def part_loss(
        moved: Tree, rest: tuple[Tree, Tree], batch: Batch, key: Array | None, weights: Any
    ) -> tuple[Array, Any]:
        terms = terms_of(join(put_back(moved, rest[0]), rest[1]), batch, key)
        loss, means = normalize(terms.losses | terms.auxiliary, weights)
        return loss, (means, terms.statistics)

    def pin(gradients: Tree) -> Tree:
        return gradients if layout is None else jax.lax.with_sharding_constraint(gradients, trained(layout))

    def gradient(
        params: Tree, batch: Batch, key: Array | None, used: Any = parts, frozen: Tree | None = None
    ) -> tuple[Tree, Metrics]:
        moved, rest = trained(params), (params, frozen or {})
        differentiate = jax.value_and_grad(part_loss, has_aux=True)
        if parts == 1:
            (loss, (means, statistics)), gradients = differentiate(moved, rest, batch, key, None)
            gradients = pin(gradients)
        else:
            # Only the weights are used, so the compiler drops the forward pass that this seems to cost.
            whole = terms_of(join(*rest), batch)
            weights = {name: weight for name, (_, weight) in (whole.losses | whole.auxiliary).items()}
            # Part m takes rows m, m + M, ...: each device keeps the rows that it holds.
            split = {n: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1) for n, x in batch.items()}

            def accumulate(number: Any, total: Any) -> Any:
                part = {name: values[number] for name, values in split.items()}
                part_key = None if key is None else jax.random.fold_in(key, number)
                (loss, (means, statistics)), gradients = differentiate(moved, rest, part, part_key, weights)
                return jax.tree.map(jnp.add, total, (pin(gradients), loss, means, statistics))

            zero = (moved, jnp.zeros(()), weights, whole.statistics)
            zero = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), zero)
            gradients, loss, means, statistics = jax.lax.fori_loop(0, used, accumulate, zero)
        reported = means | (normalize(statistics)[1] if statistics else {})
        return gradients, {"loss": loss, **reported, "tokens": jnp.sum(batch["segment_ids"] > 0)}

    return gradient

"""Learning rate as a function of the number of finished steps: warm-up, then one of the named shapes."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from transformer.config import Config, OptimizerConfig, warmup_steps


def _cosine(config: OptimizerConfig, steps: int, total: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(config.learning_rate, max(1, steps), alpha=config.final_ratio)


def _linear(config: OptimizerConfig, steps: int, total: int) -> optax.Schedule:
    return optax.linear_schedule(config.learning_rate, config.final_ratio * config.learning_rate, max(1, steps))


def _wsd(config: OptimizerConfig, steps: int, total: int) -> optax.Schedule:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv:2404.06395)."""
    decay = round(config.decay_share * total)
    last = config.final_ratio * config.learning_rate
    return optax.linear_schedule(config.learning_rate, last, max(1, decay), transition_begin=steps - decay)


def _inverse_sqrt(config: OptimizerConfig, steps: int, total: int) -> optax.Schedule:
    """Falls with the root of the number of the step (Vaswani et al. 2017, arXiv:1706.03762, section 5.3)."""
    warmup = total - steps
    return lambda count: config.learning_rate * jnp.sqrt(warmup / (warmup + jnp.maximum(count, 0)))


def _constant(config: OptimizerConfig, steps: int, total: int) -> optax.Schedule:
    return optax.constant_schedule(config.learning_rate)


SCHEDULES: dict[str, Callable[[OptimizerConfig, int, int], optax.Schedule]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def make_schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate of the step after `count` finished ones.

    The peak is that of step max(1, `warmup_steps`), so that no step is wasted on 0, and the shape ends at the last step.
    """
    warmup, total = max(1, warmup_steps(config)), config.train.num_steps
    after = SCHEDULES[config.optimizer.schedule](config.optimizer, total - warmup, total)
    rise = optax.linear_schedule(config.optimizer.learning_rate / warmup, config.optimizer.learning_rate, warmup - 1)
    return optax.join_schedules([rise, after], [warmup - 1]) if warmup > 1 else after

"""Direct preference optimisation: of two answers the preferred one becomes more probable than the other.

Rafailov et al. 2023 (arXiv:2305.18290), equation 7. A row holds pairs of conversations, each conversation a segment of its own:
of every two the first is the preferred one. How probable the model found them that the run began with, stands in `reference`,
which `training/reference.py` computes once; so the step knows of no other model.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer.config import Config, ObjectiveConfig
from transformer.models.transformer import Outputs
from transformer.objectives.chunks import in_chunks
from transformer.objectives.cross_entropy import softmax_cross_entropy
from transformer.objectives.objective import Objective
from transformer.objectives.terms import Terms


class Dpo(Objective):
    """Preferred answers over others."""

    UNIT = "pair"
    HAS_REFERENCE: ClassVar[bool] = True

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        """Adds the log-probability of each segment of a row, in order, by the model that the run began with."""
        return super().arrays(config) | {"reference": (config.data.sequence_length, "float32")}

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        """Returns the loss, a mean over pairs, and what tells how far the model has come.

        A reward is beta times the log of the ratio by which an answer has become more probable (section 4 of the paper). With
        label smoothing a preference is wrong with that probability (Mitchell 2023, "A note on DPO with noisy preferences",
        equation 3). `ipo` is the squared distance of the margin to 1 / (2 beta) (Azar et al. 2023, arXiv:2310.12036, equation
        17).
        """
        scores = segment_scores(config, outputs, batch)
        ratios = scores - batch["reference"][:, : scores.shape[1]]
        chosen, rejected = ratios[:, 0::2], ratios[:, 1::2]
        pairs = jnp.arange(1, chosen.shape[1] + 1)
        is_pair = (pairs <= jnp.max(batch["segment_ids"], axis=1, keepdims=True) // 2).astype(jnp.float32)
        margin, beta = chosen - rejected, config.dpo_beta
        if config.dpo_loss == "ipo":
            loss = jnp.square(margin - 1 / (2 * beta))
        else:
            right, wrong = (jax.nn.softplus(-sign * beta * margin) for sign in (1, -1))
            loss = (1 - config.label_smoothing) * right + config.label_smoothing * wrong
        count = jnp.sum(is_pair)
        told = {
            "reward_chosen": beta * chosen,
            "reward_rejected": beta * rejected,
            "reward_margin": beta * margin,
            "preferred": (margin > 0).astype(jnp.float32),
        }
        own = {name: (jnp.sum(value * is_pair), count) for name, value in told.items()}
        losses = {"dpo": (jnp.sum(loss * is_pair), count)}
        return Terms(losses, statistics=outputs.statistics | own, auxiliary=outputs.auxiliary)


def segment_scores(config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Float[Array, "B S"]:
    """Returns the log-probability of the weighted targets of each segment of each row, segment 1 first; a row of T tokens
    has at most S = 2 * (T // 2) segments in pairs."""
    num_segments = batch["segment_ids"].shape[1] // 2 * 2
    sums = partial(_sums, outputs, num_segments)
    if config.logit_chunk:
        sums = in_chunks(sums, config.logit_chunk)
    return sums(outputs.hidden, batch["targets"], batch["weights"], batch["segment_ids"])["scores"]


def _sums(
    outputs: Outputs,
    num_segments: int,
    hidden: Array,
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    segments: Int[Array, "B T"],
) -> dict[str, Float[Array, "B S"]]:
    cross_entropy, _ = softmax_cross_entropy(outputs.logits(hidden), targets)
    # Padding, of segment 0, has weight 0 and goes into a place that is cut off.
    add = partial(jax.ops.segment_sum, num_segments=num_segments + 1)
    return {"scores": jax.vmap(add)(-cross_entropy * weights, segments)[:, 1:]}

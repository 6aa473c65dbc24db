"""Span extraction: where in a passage the answer to a question begins and ends (Devlin et al. 2019, arXiv:1810.04805,
section 4.2; without an answer, 4.3)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from transformer.config import Config, ObjectiveConfig
from transformer.data.batches import token_arrays
from transformer.data.shards import Window
from transformer.data.tokenizers import Tokenizer
from transformer.models.transformer import MASKED_LOGIT, Outputs
from transformer.objectives.objective import Objective
from transformer.objectives.terms import Terms


class SpanExtraction(Objective):
    """The first and the last token of an answer, each a choice among the tokens of the passage and `bos`, which is none.

    `exact_match` and `f1` are those of tokens: whether the best valid span is one of those given, and how much of it they
    share. Those of words, in which the field reports, are told by `transformer predict`.
    """

    UNIT = "question"

    def terms(self, config: ObjectiveConfig, outputs: Outputs, batch: Mapping[str, Array]) -> Terms:
        starts, ends = scores(outputs, batch["may_answer"])
        known = batch["answer_starts"] > 0
        first, last = ((batch[name] - 1) for name in ("answer_starts", "answer_ends"))
        # Learned from the first answer; where annotators differ, the others are for validation.
        weights = batch["weights"][:, 0]
        losses = [_cross_entropy(logits, place[:, 0]) for logits, place in ((starts, first), (ends, last))]
        total = jnp.sum(weights)
        loss = jnp.sum((losses[0] + losses[1]) / 2 * weights)
        begin, end, _ = best_spans(starts, ends, config.max_answer_length)
        exact = jnp.any(known & (first == begin[:, None]) & (last == end[:, None]), axis=1)
        shared = jnp.minimum(last, end[:, None]) - jnp.maximum(first, begin[:, None]) + 1
        both = (last - first + 1) + (end - begin + 1)[:, None]
        f1 = jnp.max(jnp.where(known, 2 * jnp.maximum(shared, 0) / jnp.maximum(both, 1), 0), axis=1)
        measures = {name: (jnp.sum(values * weights), total) for name, values in (("exact_match", exact), ("f1", f1))}
        return Terms({"cross_entropy": (loss, total)}, measures, outputs.statistics, outputs.auxiliary)

    def example(self, config: Config, tokenizer: Tokenizer, window: Window, rng: np.random.Generator) -> Window:
        """Returns the row of one question and its passage, with the answers' places, counted from 1, one after another."""
        length, (passage,) = len(window["inputs"]), window["passage"]
        row = {name: window[name] for name in ("inputs", "positions", "segment_ids")}
        weights, may_answer = np.zeros(length, np.float32), np.zeros(length, np.int32)
        # Between `bos`, which stands for no answer, and the passage lies the question; behind it `eos`.
        weights[0], may_answer[0], may_answer[passage:-1] = 1, 1, 1
        answers = window["answers"][:length] + 1
        row |= {"weights": weights, "may_answer": may_answer}
        return row | {"answer_starts": answers[:, 0], "answer_ends": answers[:, 1]}

    def arrays(self, config: Config) -> dict[str, tuple[int, str]]:
        arrays = token_arrays(config.data.sequence_length)
        del arrays["targets"]
        places = ("may_answer", "answer_starts", "answer_ends")
        return arrays | {name: (config.data.sequence_length, "int32") for name in places}


def scores(outputs: Outputs, may_answer: Int[Array, "B T"]) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns the logits of begin and end, of which only those where an answer may lie count."""
    logits = outputs.logits(outputs.hidden)
    starts, ends = (jnp.where(may_answer > 0, logits[..., side], MASKED_LOGIT) for side in (0, 1))
    return starts, ends


def best_spans(
    starts: Float[Array, "B T"], ends: Float[Array, "B T"], longest: int
) -> tuple[Int[Array, " B"], Int[Array, " B"], Float[Array, " B"]]:
    """Returns first and last token, and the sum of their logits, of the best span of at most `longest` tokens.

    An answer at `bos`, the token 0, is that token alone.
    """
    length = starts.shape[1]
    first, last = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    valid = (first <= last) & (last < first + longest) & ((first > 0) | (last == 0))
    sums = jnp.where(valid, starts[:, :, None] + ends[:, None, :], 2 * MASKED_LOGIT)
    flat = sums.reshape(sums.shape[0], -1)
    best = jnp.argmax(flat, axis=1)
    return best // length, best % length, jnp.max(flat, axis=1)


def _cross_entropy(logits: Float[Array, "B T"], place: Int[Array, " B"]) -> Float[Array, " B"]:
    is_place = jnp.arange(logits.shape[1]) == place[:, None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_place, logits, 0), axis=-1)

"""The recurrences of linear mixers, and their gradients, in double precision and one token at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import ModelConfig
from transformer.models.spans import spans_of

PREVIOUS = 1
"""The segment that the initial state belongs to."""
SEGMENTS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 1, 2, 2, 0, 0, 3],  # padding before, within, between and after
        [4, 2, 2, 2, 2, 7, 7, 7, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)
SOURCE = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 3, 3, 3, 0, 0],  # nothing to read for segment 2
        [0, 4, 2, 2, 0, 7, 7],
        [1, 1, 1, 1, 1, 1, 1],
    ]
)
CHUNK = 16
"""Longer than some texts that are tried; divides some of the others, and not all."""
FORMS_AND_LENGTHS = [("recurrent", 1), ("recurrent", 200), ("parallel", 200)]
FORMS_AND_LENGTHS += [("chunkwise", length) for length in (1, 7, 64, 200)]
"""One token takes one step; below the chunk's length the parallel form is the chunkwise one."""


class Case(NamedTuple):
    """Inputs, gradients of outputs and last state, and what tells tokens apart."""

    inputs: dict[str, np.ndarray]
    ahead: tuple[np.ndarray, np.ndarray]
    segment_ids: np.ndarray


def random_segments(length: int) -> np.ndarray:
    """Rows: what came before goes on; packed, some segments one token long; padding before, within and after."""
    rng = np.random.default_rng(length)
    segments = np.full((3, length), PREVIOUS, np.int32)
    segments[1] = 1 + np.cumsum(rng.random(length) < 0.2)
    segments[2] = np.where(rng.random(length) < 0.4, 0, 1 + np.arange(length) // 5)
    segments[2, 0] = 0
    segments[2, -2:] = 0
    return segments


def random_case(length: int, decay: str, is_delta: bool = False) -> Case:
    """Two heads of keys of 8 and values of 6; every fifth decay is so strong that nothing is left."""
    rng = np.random.default_rng(length)
    shape, keys, values = (3, length, 2), 8, 6
    strong = np.array([-1e30, -300.0, -20.0])

    def normal(*dims: int) -> np.ndarray:
        return rng.standard_normal(dims)

    def log_decay(*dims: int) -> np.ndarray:
        weak = -np.abs(normal(*dims)) * 0.2
        return np.where(rng.random(dims) < 0.2, rng.choice(strong, dims), weak)

    inputs = {"query": normal(*shape, keys), "key": normal(*shape, keys), "value": normal(*shape, values)}
    if decay != "none":
        inputs["log_decay"] = log_decay(*shape, *([keys] if decay == "vector" else []))
    if is_delta:
        inputs["key"] /= np.linalg.norm(inputs["key"], axis=-1, keepdims=True)
        inputs["beta"] = rng.random(shape)
    inputs["state"] = normal(3, 2, keys, values)
    ahead = (normal(*shape, values), normal(3, 2, keys, values))
    inputs, ahead = jax.tree.map(lambda x: x.astype(np.float32), (inputs, ahead))
    return Case(inputs, ahead, random_segments(length))


def reference(case: Case) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Returns outputs, the last state, and the gradients of all inputs."""
    x, (output_ahead, state_ahead) = jax.tree.map(lambda a: np.asarray(a, np.float64), (case.inputs, case.ahead))
    gradients = {name: np.zeros_like(value) for name, value in x.items()}
    output, last = np.zeros_like(x["value"]), np.zeros_like(x["state"])
    for row, head in np.ndindex(x["state"].shape[:2]):
        state, segment, taken = x["state"][row, head], PREVIOUS, []
        for t in np.flatnonzero(case.segment_ids[row]):
            at = (row, t, head)
            starts = case.segment_ids[row, t] != segment
            segment = case.segment_ids[row, t]
            before = np.zeros_like(state) if starts else state
            factor = np.exp(x["log_decay"][at]) if "log_decay" in x else np.ones(())
            factor = np.broadcast_to(factor, before.shape[:1])[:, None]
            kept = factor * before
            error = x["value"][at] - x["key"][at] @ kept if "beta" in x else x["value"][at]
            change = x["beta"][at] * error if "beta" in x else error
            state = kept + np.outer(x["key"][at], change)
            output[at] = x["query"][at] @ state
            taken.append((at, starts, before, factor, kept, error, change, state))
        last[row, head] = state
        ahead = state_ahead[row, head]
        for at, starts, before, factor, kept, error, change, state in reversed(taken):
            ahead = ahead + np.outer(x["query"][at], output_ahead[at])
            gradients["query"][at] = state @ output_ahead[at]
            gradients["key"][at] = ahead @ change
            error_ahead = x["key"][at] @ ahead
            if "beta" in x:
                gradients["beta"][at] = error_ahead @ error
                error_ahead = error_ahead * x["beta"][at]
                gradients["key"][at] -= kept @ error_ahead
                ahead = ahead - np.outer(x["key"][at], error_ahead)
            gradients["value"][at] = error_ahead
            if "log_decay" in x:
                slope = np.sum(ahead * before * factor, axis=1)
                gradients["log_decay"][at] = slope if x["log_decay"].ndim == 4 else slope.sum()
            ahead = np.zeros_like(ahead) if starts else factor * ahead
        gradients["state"][row, head] = ahead
    return output, last, gradients


def run_form(mix: Any, form: Any, case: Case, chunk_length: int) -> tuple[Any, Any, dict[str, Any]]:
    """Returns what `reference` does, of one form of a recurrence."""
    config = ModelConfig(recurrence_form=form, chunk_length=chunk_length)

    def differentiated(inputs: Any, ahead: Any, segment_ids: Any) -> Any:
        spans = spans_of(segment_ids, jnp.full(len(segment_ids), PREVIOUS, jnp.int32))
        arguments = {"log_decay": None} | inputs
        (output, last), backward = jax.vjp(lambda inputs: mix(config, **(arguments | inputs), spans=spans), inputs)
        return output, last, backward(ahead)[0]

    return jax.jit(differentiated)(*case)


def assert_is_the_loop(mix: Any, form: str, case: Case, chunk_length: int) -> None:
    """Values and gradients are those of `reference`; what concerns padding is zero to the bit."""
    actual = run_form(mix, form, case, chunk_length)
    assert_close(actual, reference(case))
    padding = case.segment_ids == 0
    of_tokens = {name: gradient for name, gradient in actual[2].items() if name != "state"}
    for name, values in {"output": actual[0], **of_tokens}.items():
        assert np.all(np.asarray(values)[padding] == 0), name


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to the tolerance in norm, array by array."""
    for path, wanted in jax.tree_util.tree_leaves_with_path(expected):
        got: Any = actual
        for key in path:
            got = got[getattr(key, "idx", getattr(key, "key", None))]
        name = jax.tree_util.keystr(path)
        error = np.linalg.norm(np.asarray(got, np.float64) - wanted)
        assert error <= tolerance * np.linalg.norm(wanted) + 1e-12, (name, error, np.linalg.norm(wanted))

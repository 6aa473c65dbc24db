"""The linear recurrence in its three forms against a loop in double precision, with segments, padding and a state."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recurrences import (
    CHUNK,
    FORMS_AND_LENGTHS,
    PREVIOUS,
    assert_close,
    assert_is_the_loop,
    random_case,
    random_segments,
    reference,
)

from transformer.config import ModelConfig
from transformer.models.decay import cumulative
from transformer.models.linear_recurrence import mix
from transformer.models.spans import chunk_masks, spans_of


def test_spans_are_those_of_a_loop():
    length = 23
    segments = random_segments(length)
    spans = spans_of(jnp.asarray(segments), jnp.full(3, PREVIOUS, jnp.int32))
    found = jax.tree.map(np.asarray, vars(spans))
    for row in range(3):
        segment, number = PREVIOUS, 0
        for t in range(length):
            current = segments[row, t]
            number += current not in (0, segment)
            segment = current or segment
            assert (found["number"][row, t], found["is_token"][row, t]) == (number, current != 0), (row, t)
    # Masks of chunks, from the same numbers.
    size, numbers = min(length, 5), found["number"]
    masks = jax.tree.map(np.asarray, vars(chunk_masks(spans, size)))
    for row, i, j in np.ndindex(3, length, length):
        if i // size == j // size:
            same = numbers[row, i] == numbers[row, j] and j <= i
            assert masks["pairs"][row, 0, i // size, i % size, j % size] == same
    for row, t in np.ndindex(3, length):
        chunk, place = divmod(t, size)
        before = numbers[row, chunk * size - 1] if chunk else 0
        after = numbers[row, min(length, (chunk + 1) * size) - 1]
        assert masks["enters"][row, 0, chunk, place] == (numbers[row, t] == before)
        assert masks["leaves"][row, 0, chunk, place] == (numbers[row, t] == after)
        assert masks["carries"][row, 0, chunk] == (before == after)


@pytest.mark.parametrize(("form", "length"), FORMS_AND_LENGTHS)
@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_each_form_is_the_loop_and_its_gradient(decay, form, length):
    assert_is_the_loop(mix, form, random_case(length, decay), CHUNK)


@pytest.mark.parametrize("form", ["recurrent", "chunkwise"])
def test_a_form_is_the_loop_without_a_decay(form):
    assert_is_the_loop(mix, form, random_case(64, "none"), CHUNK)


def test_length_of_chunks_does_not_matter():
    """One that halves cannot fill."""
    assert_is_the_loop(mix, "chunkwise", random_case(40, "vector"), 11)


def test_sums_of_decays_differ_exactly():
    """A strong decay does not cost the small ones after it their digits."""
    log_decay = np.full((1, 2000, 1), -0.011, np.float32)
    log_decay[:, ::2] = -99.7
    log_decay[:, 1000:] = -0.013
    total = cumulative(jnp.asarray(log_decay), axis=1)
    exact = np.exp(np.sum(log_decay[0, 1001:1100].astype(np.float64)))
    np.testing.assert_allclose(total[0, 1099].factor(total[0, 1000])[0], exact, rtol=2e-6)


def test_bfloat16_inputs_are_summed_in_float32():
    case = random_case(64, "scalar")
    rough = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), case.inputs)
    state = case.inputs["state"]
    exact = case._replace(inputs=jax.tree.map(lambda x: np.asarray(x, np.float32), rough | {"state": state}))
    expected = reference(exact)
    spans = spans_of(jnp.asarray(case.segment_ids), jnp.full(3, PREVIOUS, jnp.int32))
    form = partial(mix, ModelConfig(chunk_length=CHUNK))
    output, last = jax.jit(form)(**rough | {"state": state}, spans=spans)
    assert output.dtype == last.dtype == jnp.float32
    assert_close((output, last), expected[:2])

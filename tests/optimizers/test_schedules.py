"""Learning rates by hand: the first step, the end of the warm-up, the middle, the last step."""

import math

import numpy as np
import pytest

from transformer.config import Config, replace
from transformer.optimizers import SCHEDULES, make_schedule


def rates(num_steps=11, **optimizer):
    optimizer = {"learning_rate": 0.5, "final_ratio": 0.1} | optimizer
    config = replace(
        Config(), data={"sequence_length": 8}, train={"num_steps": num_steps, "batch_size": 4}, optimizer=optimizer
    )
    schedule = make_schedule(config)
    return [np.asarray(schedule(count)).item() for count in range(num_steps)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_first_peak_and_last(name, warmup):
    found = rates(schedule=name, warmup_steps=warmup)
    rise = max(1, warmup)
    assert found[:rise] == pytest.approx([0.5 * (step + 1) / rise for step in range(rise)])
    assert max(found) == pytest.approx(0.5)
    last = {"constant": 0.5, "inverse_sqrt": 0.5 * math.sqrt(rise / 11)}
    assert found[-1] == pytest.approx(last.get(name, 0.05))
    assert all(after <= before for before, after in zip(found[rise - 1 :], found[rise:], strict=False))


def test_cosine():
    found = rates(schedule="cosine")
    assert found == pytest.approx([0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * n / 10)) / 2) for n in range(11)])
    assert rates(schedule="cosine", final_ratio=0.0)[-1] == pytest.approx(0, abs=1e-8)


def test_linear_after_a_warm_up():
    found = rates(schedule="linear", warmup_steps=3, final_ratio=0.0, num_steps=7)
    assert found == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.375, 0.25, 0.125, 0])


def test_wsd_is_constant_and_then_falls_over_its_share():
    found = rates(schedule="wsd", warmup_steps=2, decay_share=0.4, num_steps=10)
    assert found == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.3875, 0.275, 0.1625, 0.05])
    assert rates(schedule="wsd", decay_share=0.0) == pytest.approx([0.5] * 11)


def test_inverse_root_is_the_papers():
    """Proportional to min(step^-0.5, step * warmup^-1.5), as in section 5.3 of Vaswani et al. 2017."""
    found = rates(schedule="inverse_sqrt", warmup_steps=4)
    expected = np.array([min(step**-0.5, step * 4**-1.5) for step in range(1, 12)])
    assert found == pytest.approx(0.5 * expected / expected.max())


def test_constant():
    assert rates(schedule="constant") == pytest.approx([0.5] * 11)


def test_warm_up_in_tokens_is_rounded_up_to_steps():
    # A step has 4 x 8 tokens.
    for tokens, steps in ((96, 3), (65, 3), (64, 2), (1, 1)):
        assert rates(warmup_tokens=tokens) == rates(warmup_steps=steps)


def test_warm_up_may_be_the_whole_run():
    assert rates(warmup_steps=11)[-1] == pytest.approx(0.5)
    assert rates(num_steps=1) == pytest.approx([0.5])

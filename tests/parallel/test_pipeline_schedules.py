"""The tables of pipelines, walked through tick by tick: every dependency, every slot, and what each schedule promises."""

import numpy as np
import pytest

from transformer.parallel.schedules import IDLE, Table, schedule

SHAPES = [
    *(
        (kind, stages, parts, 1)
        for kind in ("gpipe", "1f1b")
        for stages in (1, 2, 3, 4, 8)
        for parts in (1, 2, 5, 8, 17)
    ),
    *(("interleaved", p, groups * p, rounds) for p in (1, 2, 3, 4, 8) for groups in (1, 2, 5) for rounds in (2, 3)),
]
all_shapes = pytest.mark.parametrize(("kind", "stages", "parts", "rounds"), SHAPES)


def work(table: Table, half: str) -> dict[tuple[int, int], int]:
    """Returns the tick of every (microbatch, group of layers); no two of them are the same."""
    found = {}
    numbers, rounds = getattr(table, half), getattr(table, f"{half}_round")
    assert ((numbers == IDLE) == (rounds == IDLE)).all()
    for tick, stage in np.argwhere(numbers != IDLE):
        item = (int(numbers[tick, stage]), int(rounds[tick, stage]) * numbers.shape[1] + int(stage))
        assert item not in found
        found[item] = int(tick)
    return found


@all_shapes
def test_all_that_a_stage_needs_has_just_arrived(kind, stages, parts, rounds):
    table = schedule(kind, stages, parts, rounds)
    forward, backward = work(table, "forward"), work(table, "backward")
    everything = {(part, group) for part in range(parts) for group in range(stages * rounds)}
    assert set(forward) == set(backward) == everything
    for part, group in everything:
        # Moving on takes until the next tick, and nothing is kept until later.
        assert group == 0 or forward[part, group] == forward[part, group - 1] + 1
        assert group == stages * rounds - 1 or backward[part, group] == backward[part, group + 1] + 1
        # Backward is the second half of a tick.
        assert backward[part, group] >= forward[part, group]


@all_shapes
def test_what_a_stage_keeps_is_there_when_the_gradient_comes(kind, stages, parts, rounds):
    table = schedule(kind, stages, parts, rounds)
    most = np.zeros(stages, int)
    for stage in range(stages):
        kept: dict[int, tuple[int, int]] = {}
        for tick in range(len(table.forward)):
            if table.forward[tick, stage] != IDLE:
                slot = int(table.forward_slot[tick, stage])
                assert slot not in kept and 0 <= slot < table.num_slots
                kept[slot] = (table.forward[tick, stage], table.forward_round[tick, stage])
            most[stage] = max(most[stage], len(kept))
            if table.backward[tick, stage] != IDLE:
                item = (table.backward[tick, stage], table.backward_round[tick, stage])
                assert kept.pop(int(table.backward_slot[tick, stage])) == item
        assert not kept
    np.testing.assert_array_equal(table.live, most)
    assert table.num_slots == most.max()


@all_shapes
def test_live_activations(kind, stages, parts, rounds):
    """All of them for GPipe. Else what goes forward before the first gradient is there, and one: for several rounds that is
    the warm-up of Narayanan et al., of which 1F1B here is the case of one round."""
    live, stage = schedule(kind, stages, parts, rounds).live, np.arange(stages)
    if kind == "gpipe":
        np.testing.assert_array_equal(live, parts)
    else:
        warm_up = 2 * (stages - stage - 1) + (rounds - 1) * stages
        np.testing.assert_array_equal(live, np.minimum(warm_up + 1, parts * rounds))


@pytest.mark.parametrize("backward_time", [1.0, 2.0, 3.0])
@all_shapes
def test_the_bubble_is_that_of_the_formula(kind, stages, parts, rounds, backward_time):
    bubble = schedule(kind, stages, parts, rounds).bubble(backward_time)
    assert bubble == pytest.approx((stages - 1) / (parts * rounds + stages - 1), abs=1e-12)


def test_one_of_them_by_hand():
    """Two stages, three microbatches."""
    table = schedule("1f1b", 2, 3)
    assert table.forward.T.tolist() == [[0, 1, 2, -1, -1], [-1, 0, 1, 2, -1]]
    assert table.backward.T.tolist() == [[-1, -1, 0, 1, 2], [-1, 0, 1, 2, -1]]
    assert table.live.tolist() == [3, 1]
    gpipe = schedule("gpipe", 2, 3)
    assert gpipe.forward.T.tolist() == [[0, 1, 2, -1, -1, -1, -1, -1], [-1, 0, 1, 2, -1, -1, -1, -1]]
    assert gpipe.backward.T.tolist() == [[-1, -1, -1, -1, -1, 0, 1, 2], [-1, -1, -1, -1, 0, 1, 2, -1]]

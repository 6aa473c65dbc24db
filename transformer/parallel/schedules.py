"""When each stage of a pipeline computes what: a table that is known before any data, and that the compiled step follows.

All stages take a tick together: in its first half each may send one microbatch forward through a group of layers, in its
second half bring the gradient of one back, and between ticks what was made moves on to the next stage. A half in which
every stage rests takes no time, for the program leaves it out. GPipe: Huang et al. 2019 (arXiv:1811.06965). 1F1B and
interleaved groups: Narayanan et al. 2021 (arXiv:2104.04473), sections 2.2.1 and 2.2.2.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

Kind = Literal["gpipe", "1f1b", "interleaved"]

IDLE = -1


@dataclass(frozen=True)
class Table:
    """Integer arrays [ticks, stages]; `IDLE` where a stage has nothing to do.

    A stage has `num_rounds` groups of layers, each a round of a microbatch through all stages: group `round` of stage p is
    the model's group number `round * stages + p`.
    """

    num_microbatches: int
    num_rounds: int
    forward: np.ndarray
    """The microbatch that goes forward."""
    forward_round: np.ndarray
    backward: np.ndarray
    """The microbatch whose gradient comes back."""
    backward_round: np.ndarray
    forward_slot: np.ndarray
    """Where a stage keeps what came in, until the gradient has passed."""
    backward_slot: np.ndarray

    @property
    def num_slots(self) -> int:
        """Inputs for which each device has room."""
        return 1 + int(self.forward_slot.max())

    @property
    def live(self) -> np.ndarray:
        """The most inputs, [stages], that a stage keeps at a time."""
        begun, ended = (np.cumsum(half != IDLE, axis=0) for half in (self.forward, self.backward))
        ended = np.pad(ended, ((1, 0), (0, 0)))[:-1]  # an input is read in the second half of the tick that ends it
        return (begun - ended).max(axis=0)

    def bubble(self, backward_time: float = 2.0) -> float:
        """Returns the share of the time in which a stage rests, a half backward taking so many times a half forward."""
        halves = ((self.forward, 1.0), (self.backward, backward_time))
        total = sum(time * np.sum(np.any(half != IDLE, axis=1)) for half, time in halves)
        return 1 - self.num_microbatches * self.num_rounds * (1 + backward_time) / float(total)


def schedule(kind: Kind, num_stages: int, num_microbatches: int, num_rounds: int = 1) -> Table:
    """Returns the table of a pipeline.

    Microbatches go in groups of as many as there are stages through one round after another, so that a microbatch is back
    at the first stage just when its next round begins. Gradients follow in the same way, as soon as the first microbatch
    is through (1F1B, interleaved) or when all are (GPipe). Nothing that arrives has to wait.
    """
    assert num_rounds == 1 or (kind == "interleaved" and num_microbatches % num_stages == 0), "validated"
    stages, work = np.arange(num_stages), np.arange(num_microbatches * num_rounds)
    period = num_stages * num_rounds
    microbatch = work // period * num_stages + work % num_stages
    number = work % period // num_stages
    start = num_microbatches + num_stages - 1 if kind == "gpipe" else period - 1
    num_ticks = start + num_stages - 1 + len(work)
    columns = np.full((6, num_ticks, num_stages), IDLE)
    forward, forward_round, backward, backward_round = columns[:4]
    for stage in stages:
        ahead, back = stage + work, start + num_stages - 1 - stage + work
        forward[ahead, stage], forward_round[ahead, stage] = microbatch, number
        backward[back, stage], backward_round[back, stage] = microbatch, num_rounds - 1 - number
        _keep(columns[:, :, stage])
    return Table(num_microbatches, num_rounds, *columns)


def _keep(columns: np.ndarray) -> None:
    """Gives what comes in to one stage the first slot that is free, and remembers which it was for the way back."""
    kept: dict[tuple[int, int], int] = {}
    for row in columns.T:
        if row[0] != IDLE:
            free = next(slot for slot in range(len(kept) + 1) if slot not in kept.values())
            row[4] = kept[row[0], row[1]] = free
        if row[2] != IDLE:
            row[5] = kept.pop((row[2], row[3]))

"""What the verbs that use a run have in common to be told."""

from dataclasses import dataclass

from transformer.arguments import Workdir


@dataclass(frozen=True)
class RunOptions:
    """A run, and which of its parameters."""

    workdir: Workdir = ""
    """The run directory."""
    step: int | None = None
    """Checkpoint to use; None: the latest."""
    best: bool = False
    """Use the checkpoint with the lowest validation loss."""
    average: int = 1
    """Use the mean of the parameters of this many checkpoints, the last of them the one chosen."""

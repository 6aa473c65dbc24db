"""The training loop and what it reports: state, pure step, evaluation, metrics, trackers, progress."""

DIVERGED = 3
"""Exit status of a run that ended because too many gradients in a row were not finite; `transformer.parallel` has HUNG and LOST."""

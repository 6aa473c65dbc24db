"""The training loop and what it reports: state, pure step, evaluation, metrics, trackers, progress."""

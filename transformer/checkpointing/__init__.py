"""Runs on disk: the run directory, and Orbax checkpoints in it."""

"""What a training step needs on hardware that is not here: compiled ahead of time for it, and read."""

"""The device mesh, the table that lays arrays out over it, and starting several processes."""

HUNG = 4
"""Exit status of a run in which nothing happened for `parallel.watchdog_seconds`: to be started again."""
LOST = 5
"""Exit status of a process that has lost another of the run: to be started again, all of them."""

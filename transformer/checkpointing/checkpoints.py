"""Orbax checkpoints of a run: asynchronous, atomic, restored onto any mesh. All contact with Orbax is here."""

import contextlib
import errno
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from transformer.config import CheckpointConfig, ConfigError, write_atomically

PARAMETERS, REST = "params", "rest"
"""Items of a checkpoint: parameters alone, so that they can be read alone, and everything else."""


class Checkpoints:
    """The checkpoints of one run directory. Used as a context manager: leaving waits for the last save."""

    def __init__(self, directory: Any, config: CheckpointConfig | None = None, compresses: bool = True):
        """Opens `directory`, a Path or an `etils.epath.Path`; without a `config` it is only read. Compressed parameters take
        a second time their memory while they are saved."""
        # What goes wrong in a save is raised by the next one, or by `wait`; Orbax logs it as well, with its traceback.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies: list[Any] = []
        if config is not None:
            # One policy for all: BestN alone would delete the newest checkpoint when it is not among the best.
            policies.append(checkpoint_managers.LatestN(config.keep_latest))
            if config.keep_best:
                best = {"get_metric_fn": _loss, "reverse": True, "keep_checkpoints_without_metrics": False}
                policies.append(checkpoint_managers.BestN(n=config.keep_best, **best))
            if config.keep_every_steps:
                policies.append(checkpoint_managers.EveryNSteps(config.keep_every_steps))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies) if policies else None,
            # Chooses nothing beside the policy, but without it Orbax neither writes nor reads the losses.
            best_fn=_loss,
            best_mode="min",
            cleanup_tmp_directories=config is not None,
            read_only=config is None,
            create=config is not None,
        )
        plain = None if compresses else ocp.PyTreeCheckpointHandler(use_compression=False)
        handlers = {PARAMETERS: plain or ocp.StandardCheckpointHandler(), REST: ocp.StandardCheckpointHandler()}
        self._parameters_of = ocp.args.StandardSave if compresses else ocp.args.PyTreeSave
        self._directory = directory.absolute() if isinstance(directory, Path) else directory
        with _disk_errors(self._directory):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        with _disk_errors(self._directory):
            self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that have a finished checkpoint, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """Returns the step with the lowest validation loss, if any checkpoint has one."""
        scored = [(_loss(self._manager.metrics(step)), step) for step in self.steps() if self.is_validated(step)]
        return min(scored)[1] if scored and math.isfinite(min(scored)[0]) else None

    def is_validated(self, step: int) -> bool:
        """Returns whether the checkpoint of `step` has a validation loss."""
        return bool(self._manager.metrics(step))

    def is_resumable(self, step: int) -> bool:
        """Returns whether the checkpoint of `step` has more than parameters, so that training can go on from it."""
        rest = self._manager.item_metadata(step).get(REST)
        return rest is not None and "opt_state" in getattr(rest, "tree", rest)

    def save(self, step: int, params: Any, rest: Any = None, validation_loss: float | None = None) -> None:
        """Starts a save, of `params` alone if there is nothing else; it becomes visible, by a rename, only once it is whole.
        A loss that is NaN counts as infinite.
        Raises OSError if the disk failed this save or the one before."""
        if step in self._manager.all_steps():
            return
        metrics = None if validation_loss is None else {"validation_loss": min(math.inf, validation_loss)}
        items: dict[str, Any] = {PARAMETERS: self._parameters_of(params)}
        items |= {} if rest is None else {REST: ocp.args.StandardSave(rest)}
        shards = [shard for leaf in jax.tree.leaves((params, rest)) for shard in leaf.addressable_shards]
        needed = sum(shard.data.nbytes for shard in shards if shard.replica_id == 0) + 2**20  # and metadata
        if isinstance(self._directory, Path) and shutil.disk_usage(self._directory).free < needed:
            # Found out by Orbax, it would leave a half-written checkpoint and the tracebacks of several threads.
            raise OSError(errno.ENOSPC, f"No space left for a checkpoint of {needed:,} bytes", str(self._directory))
        with _disk_errors(self._directory):
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def add_loss(self, step: int, validation_loss: float) -> None:
        """Gives a checkpoint its validation loss afterwards, in the file where Orbax looks for it."""
        metrics = json.dumps({"validation_loss": min(math.inf, validation_loss)})
        path = self._directory / str(step) / "metrics" / "metrics"
        write_atomically(path, metrics) if isinstance(path, Path) else path.write_text(metrics)
        self._manager.reload()

    def wait(self) -> None:
        """Returns when every started save is on disk; raises what went wrong in it, OSError if it was the disk."""
        with _disk_errors(self._directory):
            self._manager.wait_until_finished()

    def restore(self, step: int, **items: Any) -> dict[str, Any]:
        """Returns `items` (`params`, `rest`: trees of shape, type and sharding) filled from checkpoint `step`.

        Raises ConfigError if a shape, a type or the tree itself differs: Orbax would silently cast types.
        """
        if "opt_state" in items.get(REST, ()) and not self.is_resumable(step):
            alone = f"checkpoint {step} of {self._directory} holds parameters alone"
            raise ConfigError(f"{alone}: begin another run with them by init_from.run")
        stored = self._manager.item_metadata(step)
        problems: list[str] = []
        for name, wanted in items.items():
            problems += _differences(getattr(stored[name], "tree", stored[name]), wanted, f"checkpoint {step}: {name}")
        if problems:
            raise ConfigError(problems)
        arguments = {name: ocp.args.StandardRestore(wanted) for name, wanted in items.items()}
        return dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))


def _loss(metrics: Any) -> float:
    return metrics["validation_loss"]


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Names the directory in an error of the disk, which TensorStore raises as a ValueError."""
    try:
        yield
    except (OSError, ValueError) as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = error.errno if isinstance(error, OSError) else code and int(code[1])
        if not number:
            raise
        raise OSError(number, os.strerror(number), str(directory)) from error


def _differences(stored: Any, wanted: Any, where: str) -> list[str]:
    def described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype))
            for path, leaf in leaves
        }

    old, new = described(stored), described(wanted)
    problems = [f"{where}/{name} is in the checkpoint but not in the model" for name in sorted(old.keys() - new.keys())]
    problems += [f"{where}/{name} is not in the checkpoint" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            problems.append(f"{where}/{name} is {old[name]} in the checkpoint and {new[name]} in the model")
    return problems

"""What the model that a run begins with makes of its data: how probable it finds each conversation of each row.

One pass over the data at the start of the run, before the first step; the result stays in the run directory, two numbers for
each pair of answers. So a batch is as ever a function of (seed, step), the step needs no second model, and a run that goes on
needs nothing of where it came from.
"""

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.config import Config, ConfigError, replace, write_atomically
from transformer.data.batches import validation_batches
from transformer.data.prepared import SPLITS, Prepared, Windows
from transformer.data.shards import Window
from transformer.models.parameters import Tree
from transformer.models.transformer import Transformer, apply
from transformer.objectives.dpo import segment_scores
from transformer.parallel.sharding import global_array, local_rows, replicated

FILE = "reference.npz"


@dataclasses.dataclass(frozen=True, eq=False)
class Referenced:
    """The windows of a split, each with its `reference`."""

    windows: Windows
    reference: np.ndarray
    """Log-probability of each segment of each window, [windows, segments]."""

    @property
    def name(self) -> str:
        return self.windows.name

    @property
    def directory(self) -> Any:
        return self.windows.directory

    @property
    def shards(self) -> tuple[Any, ...]:
        return self.windows.shards

    @property
    def num_windows(self) -> int:
        return self.windows.num_windows

    @property
    def num_tokens(self) -> int:
        return self.windows.num_tokens

    @property
    def num_bytes(self) -> int:
        return self.windows.num_bytes

    def window(self, number: int, seed: int | None = None, epoch: int = 0) -> Window:
        """Returns a window with its `reference`, a number for each of its segments."""
        window = self.windows.window(number, seed, epoch)
        return window | {"reference": self.reference[number, : window["segment_ids"].max()]}


def referenced(
    config: Config,
    prepared: Prepared,
    directory: Path,
    model: Transformer,
    mesh: Mesh,
    params: Tree | None,
    is_writer: bool,
) -> Prepared:
    """Returns `prepared` with the reference of each window, by `params`, those that the run begins with, or as it was stored
    in the run's `directory` where they are None. Raises ConfigError if nothing is stored there."""
    if params is None:
        return stored(prepared, directory)
    tables = {name: _scores(config, prepared, name, model, mesh, params) for name in SPLITS}
    if is_writer:
        content = io.BytesIO()
        arrays: dict[str, Any] = {"fingerprint": np.array(prepared.fingerprint), **tables}
        np.savez(content, **arrays)
        write_atomically(directory / FILE, content.getvalue())
    return _with(prepared, tables)


def stored(prepared: Prepared, directory: Any) -> Prepared:
    """Returns `prepared` with the reference that a run has stored in its directory. Raises ConfigError."""
    try:
        with np.load(io.BytesIO((directory / FILE).read_bytes())) as found:
            tables = {name: found[name] for name in (*SPLITS, "fingerprint")}
    except FileNotFoundError as error:
        problem = "which says how probable the first model found its data; begin the run anew"
        raise ConfigError(f"{directory} has no {FILE}, {problem}") from error
    if str(tables["fingerprint"]) != prepared.fingerprint:
        raise ConfigError(f"{directory / FILE} is of other data")
    return _with(prepared, tables)


def _with(prepared: Prepared, tables: dict[str, np.ndarray]) -> Prepared:
    sources, starts = [], dict.fromkeys(SPLITS, 0)
    for source in prepared.sources:
        parts = {}
        for name in SPLITS:
            windows: Windows = getattr(source, name)
            parts[name] = Referenced(windows, tables[name][starts[name] : starts[name] + windows.num_windows])
            starts[name] += windows.num_windows
        sources.append(dataclasses.replace(source, **parts))
    return dataclasses.replace(prepared, sources=tuple(sources))


def _scores(config: Config, prepared: Prepared, name: str, model: Transformer, mesh: Mesh, params: Tree) -> np.ndarray:
    """Returns the log-probabilities of all windows of a split, source after source, [windows, segments]."""
    # Read as a validation split is: every window once, in order, the last batch filled up.
    sources = tuple(dataclasses.replace(source, validation=getattr(source, name)) for source in prepared.sources)
    size = config.evaluation.batch_size or config.train.batch_size
    rows = local_rows(mesh, size)

    def score(params: Tree, batch: dict[str, Any]) -> Any:
        return segment_scores(config.objective, apply(model, params, batch), batch)

    compiled = jax.jit(score, out_shardings=replicated(mesh))
    found = []
    every = replace(config, evaluation={"num_batches": 0})
    for local in validation_batches(every, dataclasses.replace(prepared, sources=sources), rows):
        batch = global_array(mesh, rows, size, local)
        found.append(jax.device_get(compiled(params, batch)))
    table = np.concatenate(found)[: sum(source.validation.num_windows for source in sources)]
    most = int(np.max(np.flatnonzero(np.any(table != 0, axis=0)), initial=1)) + 1
    return table[:, : most + most % 2]

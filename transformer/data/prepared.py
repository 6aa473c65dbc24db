"""What preparing leaves on disk, and how a run comes by it."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

import numpy as np

from transformer.config import Config, ConfigError, place, to_json
from transformer.data.shards import Shard, Split, Window
from transformer.data.tokenizers import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")


@runtime_checkable
class Windows(Protocol):
    """What examples are made from, by number: `shards.Split` for running text, `rows.RowSplit` for all else."""

    @property
    def name(self) -> str: ...
    @property
    def directory(self) -> PurePath: ...
    @property
    def shards(self) -> tuple[Any, ...]: ...
    @property
    def num_windows(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def window(self, number: int, seed: int | None = None, epoch: int = 0) -> Window: ...


@dataclass(frozen=True)
class Source:
    """The two splits of one source."""

    name: str
    train: Windows
    validation: Windows
    num_labels: int = 0
    """Classes of texts with labels."""
    labels: tuple[str, ...] = ()
    """Their names, in order of their numbers; none where the labels are numbers themselves."""


@runtime_checkable
class Maker(Protocol):
    """How a window of text becomes a row of a batch: what an objective does."""

    @property
    def arrays(self) -> dict[str, tuple[int, str]]:
        """Length and NumPy type of each array of a row."""
        ...

    def __call__(self, window: Window, rng: np.random.Generator) -> Window:
        """Returns the arrays of the row, each up to its length."""
        ...


@dataclass(frozen=True)
class Prepared:
    """What the batches are made from."""

    tokenizer: Tokenizer
    fingerprint: str
    """Changes whenever a token does: of the corpora, the tokenizer and the way of cutting."""
    sources: tuple[Source, ...]
    maker: Maker | None = None
    """Makes examples from windows; None: a window is an example."""

    @property
    def num_labels(self) -> int:
        """Classes of texts with labels, over all sources."""
        return max(source.num_labels for source in self.sources)

    @property
    def labels(self) -> tuple[str, ...]:
        """Their names, in order of their numbers, which are those of every source; none where labels are numbers."""
        return self.sources[0].labels


def load_prepared(tokenizer: str, fingerprint: str, sources: list[str]) -> Prepared:
    """Returns what lies in the directories of a tokenizer and of the shards of each source."""
    return Prepared(load_tokenizer(Path(tokenizer)), fingerprint, tuple(_read_index(place(path)) for path in sources))


def _read_index(directory: Any) -> Source:
    index = json.loads((directory / "index.json").read_text())
    if "kind" in index:
        # Loaded only by those whose examples are rows.
        train, validation = importlib.import_module("transformer.data.rows").splits(directory, index, SPLITS)
        return Source(index["name"], train, validation, index["num_labels"], tuple(index["labels"]))
    parts = {name: tuple(Shard(**shard) for shard in index[name]) for name in SPLITS}
    train, validation = (
        Split(name, directory, index["sequence_length"], index["token_type"], parts[name]) for name in SPLITS
    )
    return Source(index["name"], train, validation)


def prepare_apart(config: Config, show_progress: bool = True) -> Prepared:
    """Prepares the data in a process of its own, which finds at once what is there, and returns the result.

    So the process that trains never holds what only preparing needs (TFDS, the documents, a pool of workers), and
    workers are not started from one that has JAX's threads. Raises ConfigError and OSError as `prepare` does.
    """
    command = [sys.executable, "-c", "from transformer.data import prepare; prepare.main()"]
    command += [] if show_progress else ["--quiet"]
    search_path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # A session of its own: Ctrl-C is for this process, which then ends the child.
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            # Standard input stays open until the end: when it closes, the child knows that its parent has died.
            process.stdin.write(json.dumps(to_json(config)) + "\n")
            process.stdin.flush()
            answer = process.stdout.read()
        except BaseException:
            process.kill()
            raise
    result = json.loads(answer.splitlines()[-1]) if answer else {}
    if "problems" in result:
        raise ConfigError(result["problems"])
    if "errno" in result:
        raise OSError(result["errno"], *result["about"])
    assert process.returncode == 0, "preparing the data failed; its traceback is above"
    return load_prepared(**result)

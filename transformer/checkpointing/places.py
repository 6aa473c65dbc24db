"""Where a run's files lie: in a directory of this machine, or in an object store, with a local copy of the small ones.

A store replaces objects whole and can neither append nor rename. So all files of a run but its checkpoints are written
in a local directory, as those of any run, and uploaded whole where a local run would wait for its disk: before each
checkpoint is begun, and at the end. The store is the truth: the local copy is made anew at every start and then deleted.
"""

import contextlib
import dataclasses
import errno
import fcntl
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

from transformer.checkpointing import run, s3
from transformer.checkpointing.lease import Lease
from transformer.checkpointing.run import CHECKPOINTS, CONFIG, CORPUS, TOKENIZER, Place, Run
from transformer.config import ConfigError, write_atomically

RESUMED = ("metrics.jsonl", "samples.jsonl", "wandb_run_id", "reference.npz")
"""Files that a run goes on with, besides those that make it a run; all others are written anew, or beside the old ones."""


@contextlib.contextmanager
def opened(workdir: PurePath, is_writer: bool) -> Iterator[Place]:
    """Makes a run's directory usable, and holds it for one training at a time if this process is the one that writes.

    Raises ConfigError if another process has it.
    """
    if isinstance(workdir, Path):
        with locked(workdir) if is_writer else contextlib.nullcontext():
            yield Place(workdir, workdir)
        return
    s3.teach_orbax(str(workdir))
    with tempfile.TemporaryDirectory(prefix="transformer-") as parent, contextlib.ExitStack() as held:
        spool = Spool(str(workdir), Path(parent) / workdir.name)
        with spool.told():
            lease = held.enter_context(Lease(*spool.at(".lock"), str(workdir))) if is_writer else None
            spool.fetch(is_writer)

        def upload() -> None:
            if lease is not None:
                with spool.told():
                    lease.check()
                    spool.upload()

        try:
            yield Place(workdir, spool.files, upload)
        except BaseException:
            with contextlib.suppress(OSError):  # what there is may tell why
                upload()
            raise
        upload()


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a local run directory for one training at a time; raises ConfigError if another process has it."""
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{workdir} is in use by another process that trains there") from error
        yield


def load_run(workdir: PurePath) -> Run:
    """Reads a run directory in an object store; raises ConfigError if it is not one."""
    s3.teach_orbax(str(workdir))
    with tempfile.TemporaryDirectory(prefix="transformer-") as parent:
        spool = Spool(str(workdir), Path(parent) / workdir.name)
        with spool.told():
            spool.fetch(resumes=False)
        if not (spool.files / CONFIG).exists():
            raise ConfigError(f"{workdir} is not a run directory: it has no {CONFIG}")
        return dataclasses.replace(run.load_run(spool.files), workdir=workdir)


class Spool:
    """The local copy of a directory of an object store; `url` is one that fsspec understands."""

    def __init__(self, url: str, files: Path):
        import fsspec

        self._store, self._root = fsspec.core.url_to_fs(url)
        self.url, self.files = url, files
        self._sent: dict[Path, tuple[int, int]] = {}
        files.mkdir(parents=True)

    def at(self, name: str) -> tuple[Any, str]:
        """Returns the file system of the store, and the path in it of a file of this directory."""
        return self._store, f"{self._root}/{name}"

    def fetch(self, resumes: bool) -> None:
        """Downloads the files that make the directory a run, and those that a run which `resumes` goes on with."""
        # config.json first, as it is uploaded last: where it is, the others are.
        if self._download(CONFIG) or resumes:
            tokenizer = f"{self._root}/{TOKENIZER}"
            names = [f"{TOKENIZER}/{path.removeprefix(tokenizer + '/')}" for path in self._store.find(tokenizer)]
            for name in (CORPUS, *names, *(RESUMED if resumes else ())):
                self._download(name)
        if resumes and not (self.files / CONFIG).exists() and self._store.exists(f"{self._root}/{CHECKPOINTS}"):
            (self.files / CHECKPOINTS).mkdir()  # so that it is seen not to be a run

    def _download(self, name: str) -> bool:
        try:
            content = self._store.cat_file(f"{self._root}/{name}")
        except FileNotFoundError:
            return False
        write_atomically(self.files / name, content)
        self._sent[self.files / name] = _state(self.files / name)
        return True

    def upload(self) -> None:
        """Uploads, each whole, the files that have changed."""
        files = [path for path in self.files.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: path == self.files / CONFIG):
            state = _state(path)
            if self._sent.get(path) != state:
                self._store.put_file(str(path), f"{self._root}/{path.relative_to(self.files)}")
                self._sent[path] = state

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Turns whatever a client of the store raises into an OSError that names the directory."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename == self.url:
                raise
            raise OSError(errno.EIO, f"the object store failed: {error!r}", self.url) from error


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns

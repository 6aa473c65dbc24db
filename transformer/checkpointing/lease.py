"""One training at a time in a directory of an object store, where no kernel frees the lock of a process that died."""

import contextlib
import errno
import json
import os
import secrets
import socket
import sys
import threading
import time
from typing import Any

from transformer.config import ConfigError

RENEWAL, EXPIRY, SETTLING = 15.0, 60.0, 5.0
"""Seconds between two renewals; without one after which an owner counts as dead; to let others who take over be seen."""


class Lease:
    """Holds the object `path` of an fsspec file system, as a context manager; raises ConfigError if another process does.

    The store creates the object for one process alone: it refuses to create what is there. Its owner writes it anew
    every RENEWAL seconds. Whoever finds it waits until it changes, and gives up, or until it has not for EXPIRY seconds
    by its own clock, and takes it over; then it looks SETTLING seconds later whether another has done so too.

    So two processes that run do not both hold it, as long as none stands still or is cut off for longer than EXPIRY.
    One that was notices at its next `check`, and stops, having written nothing since but what was under way: a store
    cannot be told to refuse an old owner's writes.
    """

    def __init__(self, store: Any, path: str, where: str):
        self._store, self._path, self._where = store, path, where
        self._token = {"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        while not self._create():
            found = self._read()
            if found is not None and self._is_left(found) and self._read() == found:
                self._remove()
                if self._create():
                    time.sleep(SETTLING)
                    if not self._is_ours(now := self._read()):
                        raise ConfigError(self._in_use(now or found))
                    break
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        if self._is_ours(self._read()):
            self._remove()

    def check(self) -> None:
        """Raises OSError if another process has taken over."""
        if not self._is_ours(self._read()):
            problem = "The run directory was taken over by another process, as this one had not been heard of"
            raise OSError(errno.EEXIST, problem, self._where)

    def _create(self) -> bool:
        if self._read() is not None:  # some servers that speak S3 do not know the condition
            return False
        try:
            self._store.pipe_file(self._path, self._content(), mode="create")
        except FileExistsError:
            return self._is_ours(self._read())  # a request that was sent twice meets its own object
        return True

    def _content(self) -> bytes:
        return json.dumps(self._token | {"renewed": time.time()}).encode()

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._store.cat_file(self._path))
        except FileNotFoundError:
            return None

    def _remove(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._store.rm_file(self._path)

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        return found is not None and found["token"] == self._token["token"]

    def _is_left(self, found: dict[str, Any]) -> bool:
        """Returns whether the lock stays as it is for EXPIRY seconds; raises ConfigError if it is renewed."""
        last = time.strftime("%H:%M:%S", time.localtime(found["renewed"]))
        print(
            f"{self._where} was in use at {last} by process {found['pid']} of {found['host']}; "
            f"waiting {EXPIRY:.0f} s to see whether it still is",
            file=sys.stderr,
            flush=True,
        )
        until = time.monotonic() + EXPIRY
        while time.monotonic() < until:
            time.sleep(EXPIRY / 30)
            now = self._read()
            if now is None:
                return False  # given back: to be created again
            if now != found:
                raise ConfigError(self._in_use(now))
        return True

    def _in_use(self, found: dict[str, Any]) -> str:
        who = f"process {found['pid']} of {found['host']}"
        return f"{self._where} is in use by another process that trains there: {who}"

    def _renew(self) -> None:
        while not self._ended.wait(RENEWAL):
            try:
                if not self._is_ours(self._read()):
                    return  # `check` will tell
                self._store.pipe_file(self._path, self._content())
            except Exception as error:  # whatever a client raises when the network fails: the next time may go well
                print(f"the lock of {self._where} was not renewed: {error!r}", file=sys.stderr, flush=True)

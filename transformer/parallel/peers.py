"""What the processes of a run tell each other besides their collectives: that they live, what they hold, why they end.

It is a few keys in the store of JAX's coordination service, which lives in process 0. JAX itself aborts all processes when
one has died, but leaves their exit status to chance and, while a peer ends for a reason of its own, lets the others wait in a
collective. Here who leaves says why, the others learn it at once, and all end with one status; JAX's own timeout is longer,
for when this fails.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the one way to the store that JAX has, for Orbax as well

from transformer.config import ConfigError
from transformer.parallel import HUNG, LOST
from transformer.parallel.agreement import differences

_ROOT = "transformer"
_GRACE_SECONDS = 5
"""For what a process does before it ends because another has: its own message, or the stacks of its threads."""

_joined: list["Peers"] = []


def fallback_seconds(seconds: int) -> int:
    """Returns JAX's own timeout, after which it aborts what has not ended by itself."""
    return 2 * seconds + 10


def join(seconds: int) -> "Peers | None":
    """Returns what this process shares with the others since `jax.distributed.initialize`; None if it is alone.

    A process of which nothing has been heard for `seconds` is lost.
    """
    if not _joined and jax.distributed.is_initialized() and distributed.global_state.num_processes > 1:
        _joined.append(Peers(seconds))
    return _joined[0] if _joined else None


class Peers:
    """The other processes. Of its threads one says that this process lives, and in process 0 looks who does not; one waits
    for the news that somebody ends; one asks what may never be answered.
    """

    def __init__(self, seconds: int):
        state = distributed.global_state
        self.index, self.count, self.address = state.process_id, state.num_processes, str(state.coordinator_address)
        self.on_hung: Callable[[], None] = lambda: None
        self._client: Any = state.client
        self._seconds = seconds
        self._interval = min(5.0, seconds / 10)
        self._status: int | None = None
        self._ending, self._finished = threading.Event(), threading.Event()
        self._answered = time.monotonic()
        self._heard: dict[int, tuple[str, float]] = {}
        self._number = 0
        self._asks: queue.SimpleQueue[tuple[Callable[[], None], threading.Event]] = queue.SimpleQueue()
        self._answers = True
        self._say_alive(0)
        # Runs before JAX's own, which waits for all processes and would wait in vain.
        atexit.register(self._end)
        signal.signal(signal.SIGTERM, self._stop_before_the_run)
        threading.Thread(target=self._ask, name="peers: asking", daemon=True).start()
        threading.Thread(target=self._live, name="peers: alive", daemon=True).start()
        self._listener = threading.Thread(target=self._listen, name="peers: news", daemon=True)
        self._listener.start()

    def agree(self, facts: Mapping[str, str]) -> None:
        """Waits until all processes are here with theirs; raises ConfigError, in all, if any of them differ."""
        self._number += 1
        key = f"agreement/{self._number}"
        self._set(f"{key}/{self.index}", json.dumps(dict(facts)))
        if self.index == 0:
            held = [json.loads(self._get(f"{key}/{index}")) for index in range(self.count)]
            self._set(f"{key}/problems", json.dumps(differences(held)))
        if problems := json.loads(self._get(f"{key}/problems")):
            raise ConfigError(problems)

    def leave(self, status: int, reason: str) -> None:
        """Tells the others that this process ends, and why: they will end with the same status.

        The process then has to end: at its exit it waits for nobody but, being 0, for the others to have read this.
        """
        if self._ending.is_set():
            # Another thread is ending this process, for a reason that came first; this one may follow from that.
            time.sleep(4 * _GRACE_SECONDS)
        self._status = status
        self._ending.set()
        self._tell(self.index, status, reason)

    def wait_for_news(self) -> None:
        """Returns when a peer would have been found lost by now. If one is, this process ends before."""
        self._listener.join(self._seconds + 2 * self._interval + 2 * _GRACE_SECONDS)

    def _tell(self, index: int, status: int, reason: str) -> None:
        # The first reason counts: what others give after it mostly follows from it.
        news = {"index": index, "status": status, "reason": reason, "host": socket.gethostname()}
        self._try(lambda: self._set("end", json.dumps(news)), _GRACE_SECONDS)

    def _live(self) -> None:
        number = 0
        while not self._finished.wait(self._interval):
            number += 1
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._say_alive(number)
                if self.index == 0:
                    self._look_for_the_lost()

    def _say_alive(self, number: int) -> None:
        self._set(f"alive/{self.index}", f"{number} {socket.gethostname()}", allow_overwrite=True)
        self._answered = time.monotonic()

    def _look_for_the_lost(self) -> None:
        now = time.monotonic()
        for key, text in self._client.key_value_dir_get(f"{_ROOT}/alive/"):
            index = int(key.rpartition("/")[2])
            if self._heard.get(index, ("", 0))[0] != text:
                self._heard[index] = (text, now)
        for index, (text, since) in self._heard.items():
            if now - since > self._seconds:
                host = text.partition(" ")[2]
                reason = f"process {index} of {self.count} ({host}) is lost: no sign of life for {self._seconds} s"
                self._tell(index, LOST, reason)
                self._finished.set()
                return

    def _listen(self) -> None:
        while True:
            try:
                news = json.loads(self._client.blocking_key_value_get(f"{_ROOT}/end", int(1000 * self._interval)))
                break
            except jax.errors.JaxRuntimeError as error:
                silent = time.monotonic() - self._answered
                if silent > self._seconds + self._interval:
                    reason = f"no answer for {silent:.0f} s"
                    self.quit(LOST, f"process 0 of {self.count} ({self.address}) is lost: {reason}")
                if "DEADLINE_EXCEEDED" not in str(error):
                    time.sleep(self._interval)
        if news["status"] and news["index"] != self.index:
            self._follow(**news)

    def _follow(self, index: int, status: int, reason: str, host: str) -> None:
        if status == HUNG:
            self.on_hung()
        # This process may be about to end by itself, with a message of its own.
        if status != LOST and self._ending.wait(_GRACE_SECONDS):
            return
        self.quit(status, reason if status == LOST else f"process {index} of {self.count} ({host}) ended: {reason}")

    def quit(self, status: int, reason: str) -> NoReturn:
        """Tells the others, unless they know a reason already, and ends this process, from whatever thread."""
        print(f"error: {reason}; process {self.index} ends with status {status}", file=sys.stderr, flush=True)
        self.leave(status, reason)
        self._end()
        os._exit(status)

    def _end(self) -> None:
        """Ends this process at once if it has left, and otherwise returns when all have finished."""
        if self._status is None and (error := getattr(sys, "last_value", None)) is not None:
            self.leave(1, f"{type(error).__name__}: {error}")
        if self._status is None:
            if self.index == 0:
                self._tell(0, 0, "finished")
            self._listener.join()
            self._finished.set()
            return
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        # Process 0 last: JAX aborts whoever outlives it.
        self._try(self._wait_for_the_others, (3 if self.index == 0 else 1) * _GRACE_SECONDS)
        os._exit(self._status)

    def _wait_for_the_others(self) -> None:
        """Returns when all that live have read the news: they need process 0 for that, and their collectives for stacks."""
        self._set(f"left/{self.index}", "")
        oldest = time.monotonic() - self._seconds
        expected = sum(since >= oldest for _, since in self._heard.values()) or self.count
        if self.index == 0 or self._status == HUNG:
            while len(self._client.key_value_dir_get(f"{_ROOT}/left/")) < expected:
                time.sleep(0.1)

    def _try(self, ask: Callable[[], None], seconds: float) -> None:
        """Asks something of process 0, which may not live any more or never answer; if it once has not, asks no more."""
        answered = threading.Event()
        self._asks.put((ask, answered))
        if self._answers and not answered.wait(seconds):
            self._answers = False

    def _ask(self) -> None:
        """A thread of its own: one may not be started any more when a process ends."""
        while True:
            ask, answered = self._asks.get()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                ask()
            answered.set()

    def _stop_before_the_run(self, number: int, frame: FrameType | None) -> None:
        self.leave(128 + number, "stopped by a signal before the run began")
        raise SystemExit(128 + number)

    def _set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        self._client.key_value_set(f"{_ROOT}/{key}", value, allow_overwrite=allow_overwrite)

    def _get(self, key: str) -> str:
        while True:
            try:  # in turns, so that signals are heard
                return self._client.blocking_key_value_get(f"{_ROOT}/{key}", 1000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

"""A parent for each of several processes, which has the last word where its child cannot speak.

When the connection to process 0 breaks, JAX's runtime aborts the others from within C++, at once and without saying whom they
have lost; the system kills whoever takes too much memory. The parent is forked before JAX is imported, passes signals on,
waits, and gives the end of its child a line and an exit status. So it may also be process 1 of a container.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from types import FrameType
from typing import NamedTuple

from transformer.parallel import LOST


class Place(NamedTuple):
    """Where a process stands, as far as its parent has been told."""

    address: str = ""
    """Of process 0."""
    index: int = -1
    count: int = 0
    joined: bool = False
    """Whether all have found each other."""


_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def supervise() -> int:
    """Forks. Returns in the child only: the end of a pipe, for `tell`."""
    reader, writer = os.pipe()
    parent, child = os.getpid(), os.fork()
    if not child:
        os.close(reader)
        _end_with(parent)
        return writer
    os.close(writer)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        status, text = explain(-status, _told(reader))
        print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(status)


def tell(writer: int, place: Place) -> None:
    """Tells the parent where its child stands."""
    os.write(writer, f"{place.address} {place.index} {place.count} {place.joined:d}\n".encode())


def explain(number: int, place: Place) -> tuple[int, str]:
    """Returns exit status and reason of a child that ended by signal `number`."""
    address, index, count, joined = place
    who = f"process {index} of {count}" if count else "this process"
    if number == signal.SIGABRT and count and not joined:
        return LOST, f"{who}: not all processes came to {address} in time; start all of them again"
    if number == signal.SIGABRT and index > 0 and not _reachable(address):
        return LOST, f"process 0 of {count} ({address}) is lost, and so {who} ends; start all of them again"
    named = signal.Signals(number).name
    reason = ", as the system does where memory runs out" if number == signal.SIGKILL else ""
    return 128 + number, f"{who} was ended by {named}{reason}"


def _told(reader: int) -> Place:
    os.set_blocking(reader, False)  # a grandchild may still have the other end
    with contextlib.suppress(BlockingIOError):
        if lines := os.read(reader, 65536).decode().splitlines():
            address, index, count, joined = lines[-1].split(" ")
            return Place(address, int(index), int(count), joined == "1")
    return Place()


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def _end_with(parent: int) -> None:
    """Has the system kill this process when its parent dies, where it can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(128 + signal.SIGKILL)

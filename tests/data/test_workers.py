"""Work by several processes gives what one gives, and says what went wrong."""

import functools
import os

import pytest

from transformer.config import ConfigError
from transformer.data.files import decode
from transformer.data.workers import Workers

DECODE = functools.partial(decode, errors="strict", where="a document")


def test_results_come_in_order_from_other_processes(capfd: pytest.CaptureFixture[str]) -> None:
    texts = [str(number) for number in range(50)]
    for num_workers in (1, 2):
        with Workers(num_workers, True) as workers:
            assert workers.map(DECODE, [text.encode() for text in texts], "decoding") == texts
            processes = workers.map(_process_id, [0] * 20, "asking")
        assert (os.getpid() in processes) == (num_workers == 1)
        lines = capfd.readouterr().err.splitlines()
        assert lines[-1] == "asking: 20 of 20" and "decoding: 50 of 50" in lines


def _process_id(_: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_mistake_found_by_a_worker_reaches_the_user(num_workers: int, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        Workers(num_workers, False) as workers,
        pytest.raises(ConfigError, match="a document is not UTF-8: byte 0xff at offset 4"),
    ):
        workers.map(DECODE, [b"good", b"bad \xff", b"good"], "decoding")
    assert capfd.readouterr().err == ""

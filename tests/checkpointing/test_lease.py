"""The lock of a run directory in an object store: one holder at a time, and none that outlives its process for long."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest

from transformer.checkpointing import lease
from transformer.checkpointing.lease import Lease
from transformer.config import ConfigError

PATH, WHERE = "/bucket/run/.lock", "memory://bucket/run"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, seconds in (("RENEWAL", 0.02), ("EXPIRY", 0.3), ("SETTLING", 0.05)):
        monkeypatch.setattr(lease, name, seconds)
    store = fsspec.filesystem("memory")
    yield store
    if store.exists("/bucket"):
        store.rm("/bucket", recursive=True)


def write(store: Any, token: str) -> None:
    store.pipe_file(PATH, json.dumps({"host": "h", "pid": 7, "token": token, "renewed": time.time()}).encode())


def test_one_process_at_a_time(store: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with Lease(store, PATH, WHERE) as first:
        with pytest.raises(ConfigError, match="is in use by another process that trains there: process"):
            Lease(store, PATH, WHERE).__enter__()
        assert "waiting 0 s to see whether it still is" in capsys.readouterr().err
        first.check()
    assert not store.exists(PATH)
    with Lease(store, PATH, WHERE):
        pass


def test_the_lock_of_a_dead_process_is_taken_over(store: Any) -> None:
    write(store, "dead")
    begin = time.monotonic()
    with Lease(store, PATH, WHERE) as taken:
        assert time.monotonic() - begin >= lease.EXPIRY
        taken.check()
    assert not store.exists(PATH)


def test_of_two_that_take_over_one_goes_on(store: Any) -> None:
    write(store, "dead")
    holds, refused, everyone_tried = [], [], threading.Event()

    def take() -> None:
        try:
            with Lease(store, PATH, WHERE) as taken:
                taken.check()
                holds.append(taken)
                everyone_tried.wait(10)
        except ConfigError as error:
            refused.append(error)
        if len(refused) == 3:
            everyone_tried.set()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (len(holds), len(refused)) == (1, 3)


def test_whoever_was_taken_for_dead_stops_and_leaves_the_lock_of_another(store: Any) -> None:
    with Lease(store, PATH, WHERE) as first:
        write(store, "another")
        with pytest.raises(OSError, match="taken over by another process") as raised:
            first.check()
        assert raised.value.filename == WHERE
        time.sleep(0.1)
    assert json.loads(store.cat_file(PATH))["token"] == "another"


def test_a_store_that_fails_for_a_while_costs_no_lock(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Lease(store, PATH, WHERE) as first:
        with monkeypatch.context() as patch:
            patch.setattr(type(store), "cat_file", lambda *_, **__: 1 / 0)
            time.sleep(0.1)
        before = store.cat_file(PATH)
        time.sleep(0.1)
        assert store.cat_file(PATH) != before, "no longer renewed"
        first.check()

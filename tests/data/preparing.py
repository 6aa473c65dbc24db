"""Preparing in a process of its own, which a test can kill."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformer.config import Config, to_json

PROGRAM = """
import sys, time
from transformer.config import from_json
from transformer.data import prepare, writing

prepare.SHARD_BYTES = 1000
write = writing.write_records

def slowly(*arguments):
    time.sleep(0.01)
    return write(*arguments)

writing.write_records = slowly  # in the workers too, which import this file
if __name__ == "__main__":
    prepare.prepare(from_json(open(sys.argv[1]).read()))
"""


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"
    }


def start(config: Config, directory: Path) -> subprocess.Popen:
    (directory / "program.py").write_text(PROGRAM)
    (directory / "config.json").write_text(to_json(config))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(directory / "program.py"), str(directory / "config.json")]
    return subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return output


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return condition()


def no_process_in(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def kill_twice(config: Config, directory: Path, num_shards: int, seed: int) -> dict[Path, int]:
    """Starts to prepare and kills it, early and later; returns the shards that are there, and when they were written."""
    generator = random.Random(seed)
    tokens = directory / "cache" / "tokens"
    for kill in range(2):
        process = start(config, directory)
        if kill == 0:
            time.sleep(generator.uniform(0.2, 2.5))
        else:
            wanted = generator.randint(num_shards // 4, num_shards // 2)
            assert wait_for(lambda wanted=wanted: len(list(tokens.rglob("*.array_record"))) >= wanted)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert wait_for(lambda process=process: no_process_in(process.pid), 20), "workers outlive their parent"
    shards = {path: path.stat().st_mtime_ns for path in tokens.rglob("*.array_record")}
    assert len(shards) >= num_shards // 4
    return shards

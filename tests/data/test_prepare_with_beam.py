"""Preparing by Apache Beam: the same bytes as by this machine's processes, and the same mistakes told."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import contents, wait_for

from transformer.config import Config, ConfigError, replace, to_json
from transformer.data import prepare as preparing
from transformer.data.prepare import prepare

MakeConfig = Callable[..., Config]
RandomText = Callable[[int, int], str]


def test_a_runner_that_does_not_exist(make_config: MakeConfig) -> None:
    from transformer.data import beam

    with pytest.raises(ConfigError, match=r"--runner = 'flnk': must be one of direct, flink, .*did you mean flink"):
        beam.prepare(make_config(["a"]), "flnk")


def with_beam(config: Config, *options: str) -> None:
    pytest.importorskip("apache_beam", reason="extra beam")
    from transformer.data import beam

    beam.prepare(config, "direct", options, show_progress=False)


def made(config: Config) -> dict[str, bytes]:
    root = Path(config.data.cache_dir)
    return {name: content for name, content in contents(root).items() if name.startswith(("tokens", "tokenizers"))}


def both(config: Config, directory: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What Beam makes of a corpus, and what this process does."""
    configs = [replace(config, data={"cache_dir": str(directory / name)}) for name in ("beam", "local")]
    with_beam(configs[0])
    prepare(configs[1], False)
    return made(configs[0]), made(configs[1])


@pytest.mark.parametrize("kind", ["bpe", "characters", "labelled"])
def test_beam_writes_the_bytes_that_local_workers_write(
    make_config: MakeConfig, random_text: RandomText, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("apache_beam", reason="extra beam")
    monkeypatch.setattr(preparing, "SHARD_BYTES", 2000)
    if kind == "labelled":
        path = tmp_path / "reviews.jsonl"
        path.write_text("".join(f'{{"text": "{i} of them", "label": "{"ab"[i % 2]}"}}\n' for i in range(200)))
        objective = {"name": "sequence_classification"}
        config = replace(
            make_config(path=(str(path),)),
            objective=objective,
            model={"architecture": "encoder", "layers": "attention"},
        )
    else:
        config = make_config([random_text(i, 40) for i in range(60)], tokenizer=kind, tokenizer_vocab_size=400)
    by_beam, local = both(config, tmp_path)
    assert len(by_beam) > 4 and by_beam == local
    assert not list((tmp_path / "beam" / "beam").iterdir()), "results were left behind"


def test_a_broken_document_is_the_users_mistake(make_config: MakeConfig, tmp_path: Path) -> None:
    for name in "abcdefgh":
        (tmp_path / f"{name}.txt").write_bytes(b"text \xff text" if name == "f" else b"text")
    with pytest.raises(ConfigError, match=r"f\.txt.*byte"):
        with_beam(make_config(path=(str(tmp_path / "*.txt"),)))


def test_an_option_that_beam_does_not_know(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"Beam has no option 'direct_num_worker'.*did you mean direct_num_workers"):
        with_beam(make_config(["a"]), "direct_num_worker=2")


PROGRAM = """
import sys
from transformer.config import from_json
from transformer.data import beam, prepare
prepare.SHARD_BYTES = 1000
beam.prepare(from_json(open(sys.argv[1]).read()), "direct", show_progress=False)
"""


def test_a_kill_loses_and_doubles_no_shard(make_config: MakeConfig, random_text: RandomText, tmp_path: Path) -> None:
    pytest.importorskip("apache_beam", reason="extra beam")
    config = make_config([random_text(i, 300) for i in range(120)], cache_dir=str(tmp_path / "killed"))
    (tmp_path / "config.json").write_text(to_json(config))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "config.json")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        start_new_session=True,
    )
    tokens = tmp_path / "killed" / "tokens"
    assert wait_for(lambda: len(list(tokens.rglob("*.array_record"))) >= 20)
    process.send_signal(signal.SIGKILL)
    process.wait()
    shards = {path: path.stat().st_mtime_ns for path in tokens.rglob("*.array_record")}
    assert not list(tokens.rglob("index.json")), "it was done before it was killed"
    time.sleep(0.01)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "SHARD_BYTES", 1000)
        with_beam(config)
        whole = replace(config, data={"cache_dir": str(tmp_path / "whole")})
        prepare(whole, False)
    assert made(config) == made(whole)
    assert all(path.stat().st_mtime_ns == written for path, written in shards.items()), "shards were made again"


@pytest.mark.slow
def test_the_demos_corpus(tmp_path: Path) -> None:
    """The Python standard library, with the tokenizer and the length of configs/stdlib.py."""
    from transformer.arguments import load_config
    from transformer.objectives import with_window

    config, problems, _ = load_config("stdlib")
    assert not problems
    by_beam, local = both(with_window(config), tmp_path)
    assert len(by_beam) > 10 and by_beam == local

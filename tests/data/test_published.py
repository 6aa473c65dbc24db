"""Prepared data in a directory of its own: what a run reads there is what it would have prepared."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transformer.config import Config, ConfigError, replace
from transformer.data import published
from transformer.data.batches import train_batch
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared

MakeConfig = Callable[..., Config]
RandomText = Callable[[int, int], str]


@pytest.fixture
def made(make_config: MakeConfig, random_text: RandomText, tmp_path: Path) -> tuple[Config, Prepared, Config]:
    """A configuration, what it prepares, and the configuration that reads this where it is published, without the text."""
    config = make_config([random_text(i, 60) for i in range(40)], tokenizer="characters")
    prepared = prepare(config, False)
    published.publish(config, prepared, str(tmp_path / "there"))
    elsewhere = {"prepared": str(tmp_path / "there"), "cache_dir": str(tmp_path / "other"), "path": ()}
    return config, prepared, replace(config, data=elsewhere)


def same(config: Config, ours: Prepared, theirs: Prepared) -> None:
    assert ours.fingerprint == theirs.fingerprint
    assert ours.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    for step in (0, 40):  # a later epoch too, whose cuts depend on the names of directory and shard
        one, other = train_batch(config, ours, step), train_batch(config, theirs, step)
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("copies", [None, True])
def test_batches_are_those_of_the_run_that_prepares_itself(
    made: tuple[Config, Prepared, Config], tmp_path: Path, copies: bool | None, capsys: pytest.CaptureFixture[str]
) -> None:
    config, prepared, reads = made
    reads = replace(reads, data={"copy_prepared": copies})
    found = prepare(reads)
    same(config, prepared, found)
    where = tmp_path / ("there" if copies is None else "other")
    assert where in Path(found.sources[0].train.directory).parents
    assert (
        f"MiB of tokens, {'read in' if copies is None else 'copied from'} {tmp_path / 'there'}"
        in capsys.readouterr().err
    )
    if copies:
        shutil.rmtree(tmp_path / "there" / "tokens")
        same(config, prepared, prepare(reads, False))  # copied once


def test_a_copy_that_is_damaged_or_cut_short_is_not_used(made: tuple[Config, Prepared, Config], tmp_path: Path) -> None:
    *_, reads = made
    reads = replace(reads, data={"copy_prepared": True})
    shard = next((tmp_path / "there" / "tokens").rglob("train*.array_record"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + b"?")
    with pytest.raises(ConfigError, match=rf"{shard.name} is not what prepared.json says"):
        prepare(reads, False)
    shard.write_bytes(content)
    prepare(reads, False)
    assert not list((tmp_path / "other").rglob("*.partial"))


def test_only_what_is_missing_is_published_again(made: tuple[Config, Prepared, Config], tmp_path: Path) -> None:
    config, prepared, _ = made
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "there").rglob("*.array_record")}
    lost = next(iter(shards))
    lost.unlink()
    (tmp_path / "there" / "prepared.json").unlink()
    published.publish(config, prepared, str(tmp_path / "there"))
    assert lost.exists() and (tmp_path / "there" / "prepared.json").exists()
    assert all(path.stat().st_mtime_ns == time for path, time in shards.items() if path != lost)


def test_what_contradicts_the_published_data_is_named(made: tuple[Config, Prepared, Config], tmp_path: Path) -> None:
    *_, reads = made
    with pytest.raises(ConfigError, match=r"was prepared for lengths \[16\], and this configuration needs \[32\]"):
        prepare(replace(reads, data={"sequence_length": 32}), False)
    with pytest.raises(
        ConfigError, match=r"data.tokenizer = 'bytes' contradicts data.prepared = .*, which has 'characters'"
    ):
        prepare(replace(reads, data={"tokenizer": "bytes"}), False)
    with pytest.raises(ConfigError, match=r"data.weights has 2 numbers for 1 sources"):
        prepare(replace(reads, data={"weights": (1.0, 2.0)}), False)
    with pytest.raises(ConfigError, match=r"there is no prepared.json; transformer prepare --publish makes"):
        prepare(replace(reads, data={"prepared": str(tmp_path)}), False)
    index = tmp_path / "there" / "prepared.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 0}))
    with pytest.raises(ConfigError, match="another version of this code"):
        prepare(reads, False)

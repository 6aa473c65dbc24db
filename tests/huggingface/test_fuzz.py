"""Damaged and hostile folders: each is refused in words or read, nothing outside is opened, and no memory goes by a lie."""

import json
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logits import mesh_of
from references import REFERENCES, write_folder

from transformer.config import ConfigError
from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.writing import write

LARGEST = 48 * 2**20
"""Bytes that reading a folder of 40 kB may hold at one time: portions and headers are small."""

VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), "", "x", "../x", "a" * 5000),
    *([], [1, 2], {}, {"a": 1}, [[[]]], [0] * 1000),
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two shards, and beside it a file that nobody may open."""
    reference = json.loads((REFERENCES / "llama-llama3.json").read_text())
    root = tmp_path_factory.mktemp("fuzz")
    write_folder(root / "one", reference["config"], reference["shapes"], 0)
    model, params = read(root / "one", mesh_of())
    (root / "sound").mkdir()
    write(root / "sound", family_of("llama"), model, params, shard_size=40_000)
    shutil.copy(root / "one" / "model.safetensors", root / "secret.safetensors")
    return root / "sound"


_opened: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None:
        _opened.append(str(arguments[0]))


@pytest.fixture(scope="module")
def opened() -> Iterator[Callable[[], list[str]]]:
    """Records which files Python opens; a hook of the interpreter stays, so it does nothing afterwards."""
    global _opened
    sys.addaudithook(_hook)

    def taken() -> list[str]:
        global _opened
        found, _opened = list(_opened or ()), []
        return found

    _opened = []
    yield taken
    _opened = None


def damage_bytes(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    kind = rng.randrange(5)
    if kind == 0:
        del content[rng.randrange(len(content)) :]
    elif kind == 1:
        content += rng.randbytes(rng.randrange(1, 100))
    elif kind == 2:
        place = rng.randrange(len(content))
        content[place : place + rng.randrange(1, 40)] = rng.randbytes(rng.randrange(40))
    else:
        # Most of a file is numbers, so that damage there is no damage to its form.
        for _ in range(rng.randrange(1, 4)):
            content[rng.randrange(min(len(content), 2000))] = rng.randrange(256)
    path.write_bytes(content)


def damage_header(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.randrange(8)
    if kind == 0:
        header[name]["dtype"] = rng.choice(["F64", "I32", "F4", "BF16", "", "BOOL", 7, None, "F16"])
    elif kind == 1:
        header[name]["shape"] = rng.choice([[2**40, 2**40], [-1], [], "x", [1.5], [2**62] * 60, [0], [[1]], [1] * 1000])
    elif kind == 2:
        header[name]["data_offsets"] = rng.choice(
            [[0, 2**62], [5, 3], [-4, 0], [0], [0, 1, 2], None, [0, 4], ["a", "b"]]
        )
    elif kind == 3:
        header[rng.choice([f"{name}.twin", "", "model.layers.99999.x", "__metadata__"])] = header[name]
    elif kind == 4:
        del header[name]
    elif kind == 5:
        header[name] = rng.choice(VALUES)
    text = json.dumps(header).encode()
    if kind == 6:  # the same name twice
        text = text[:-1] + b"," + json.dumps(name).encode() + b":" + json.dumps(header[name]).encode() + b"}"
    said = rng.choice([2**63, 2**40, 10**8, length + 1, 0, 2**64 - 1]) if kind == 7 else len(text)
    path.write_bytes(said.to_bytes(8, "little") + text + rest)


def damage_index(path: Path, rng: random.Random) -> None:
    index = json.loads(path.read_text())
    name = rng.choice(list(index["weight_map"]))
    secret = path.parent.parent / "secret.safetensors"
    kind = rng.randrange(5)
    if kind == 0:
        places = ["../secret.safetensors", str(secret), "link.safetensors", "loop.safetensors", "pipe.safetensors"]
        places += ["", ".", "a/b.safetensors", "\0.safetensors", "x" * 300 + ".safetensors", "config.json"]
        place = rng.choice(places)
        for tensor in index["weight_map"] if rng.random() < 0.5 else [name]:
            index["weight_map"][tensor] = place
    elif kind == 1:
        index["weight_map"][name] = rng.choice(VALUES)
    elif kind == 2:
        index["weight_map"][f"{name}.twin"] = index["weight_map"][name]
    elif kind == 3:
        del index["weight_map"][name]
    else:
        index["weight_map"] = rng.choice(VALUES)
    path.write_text(json.dumps(index))


def damage_config(path: Path, rng: random.Random) -> None:
    config = json.loads(path.read_text())
    for _ in range(rng.randrange(1, 3)):
        inside = (
            config["rope_scaling"] if isinstance(config.get("rope_scaling"), dict) and rng.random() < 0.3 else config
        )
        key = rng.choice([*inside, "quantization_config", "rope_parameters", "rope_scaling"])
        if rng.random() < 0.2:
            inside.pop(key, None)
        else:
            inside[key] = rng.choice(VALUES)
    path.write_text(json.dumps(config))


def damaged(sound: Path, target: Path, seed: int) -> None:
    """Makes a copy of a sound folder with one thing wrong."""
    rng = random.Random(seed)
    shutil.copytree(sound, target)
    (target / "link.safetensors").symlink_to(sound.parent / "secret.safetensors")
    (target / "loop.safetensors").symlink_to(target / "loop.safetensors")
    shard = target / rng.choice(sorted(path.name for path in sound.glob("*.safetensors")))
    index, config = target / "model.safetensors.index.json", target / "config.json"
    ways: list[Callable[[], None]] = [
        lambda: damage_bytes(shard, rng),
        lambda: damage_header(shard, rng),
        lambda: damage_index(index, rng),
        lambda: damage_config(config, rng),
        lambda: damage_bytes(rng.choice([index, config]), rng),
    ]
    rng.choice(ways)()


def survives(sound: Path, target: Path, seed: int, opened: Callable[[], list[str]]) -> bool:
    """Returns whether a damaged folder was read, and raises unless it was read or refused as it ought to be."""
    damaged(sound, target, seed)
    mesh = mesh_of()
    opened()
    tracemalloc.start()
    try:
        _, params = read(target, mesh)
        assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == np.float32, params))
        was_read = True
    except ConfigError as error:
        assert 0 < len(str(error)) < 100_000, seed
        assert str(target) in str(error) or "model_type" in str(error), (seed, str(error)[:500])
        was_read = False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < LARGEST, (seed, peak)
    outside = [name for name in opened() if name.startswith(str(sound.parent)) and not name.startswith(str(target))]
    assert not outside, (seed, outside)
    shutil.rmtree(target)
    return was_read


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_folders(count: int, sound: Path, tmp_path: Path, opened: Callable[[], list[str]]) -> None:
    target = sound.parent / f"damaged-{count}"
    read_anyway = sum(survives(sound, target, seed, opened) for seed in range(count))
    print(f"{read_anyway} of {count} were read, the others refused")
    assert 0 < read_anyway < count / 2

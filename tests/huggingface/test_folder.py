"""What is refused of a folder, each with one message that says what and where."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from logits import mesh_of
from references import REFERENCES, weight, write_folder
from safetensors.numpy import load_file, save_file

from transformer.config import ConfigError
from transformer.huggingface.families import FAMILIES
from transformer.huggingface.folder import Folder
from transformer.huggingface.header import read_header
from transformer.huggingface.reading import read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    reference = json.loads((REFERENCES / "llama.json").read_text())
    write_folder(tmp_path / "model", reference["config"], reference["shapes"], 0)
    return tmp_path / "model"


def message(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, mesh_of())
    return str(caught.value)


def change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def with_header(path: Path, header: bytes, length: int | None = None, rest: bytes = b"\0" * 8) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + rest)


@pytest.mark.parametrize(
    ("header", "length", "expected"),
    [
        (b"{}", 2**60, "at offset 0 of 18 bytes: its header would be 1,152,921,504,606,846,976 bytes long"),
        (b"[]", None, "the header at offset 8 is not an object"),
        (b'{"a":', None, "the header at offset 8 is not JSON"),
        (b'{"a":1,"a":2}', None, "'a' stands there twice"),
        (b'{"a":{"dtype":"F32","shape":[2]}}', None, "must have dtype, shape and data_offsets"),
        (b'{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}', None, "has the type 'F31'"),
        (b'{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', None, "has the shape [-2]"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,9999]}}', None, "and the file ends at"),
        (b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,8]}}', None, "its offsets leave 8"),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', None, "the tensors end at offset 66"),
        (
            b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
            None,
            "'b' at offset 119 overlaps the tensor before it",
        ),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}', None, "'a' at offset 66 begins after a gap"),
        (
            json.dumps({"a": {"dtype": "F32", "shape": [2**62] * 60, "data_offsets": [0, 8]}}).encode(),
            None,
            "has a number of many digits bytes",
        ),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: bytes, length: int | None, expected: str) -> None:
    with_header(tmp_path / "a.safetensors", header, length)
    with pytest.raises(ConfigError) as caught:
        read_header(tmp_path / "a.safetensors")
    assert expected in str(caught.value) and "a.safetensors" in str(caught.value)


def test_a_file_that_is_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "cut off, or damaged" in message(folder)
    path.write_bytes(b"abc")
    assert "shorter than the header's length" in message(folder)


def test_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has pytorch_model.bin and no model.safetensors: a pickle runs any code" in message(folder)


def test_the_nearest_family_is_named(folder: Path) -> None:
    change(folder, model_type="lama")
    assert message(folder) == f"model_type = 'lama' is none of {', '.join(sorted(FAMILIES))} (did you mean llama?)"


def test_all_tensors_that_lack_or_are_too_many_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra.weight"] = np.zeros((2, 3), np.float32)
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["lm_head.weight"] = np.zeros((5, 30), np.float32)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((44, 30), np.float64)
    save_file(tensors, folder / "model.safetensors")
    found = message(folder)
    for expected in (
        "model.norm.weight (30,) is missing",
        "model.layers.1.mlp.up_proj.weight (44, 30) is missing",
        "model.extra.weight (2, 3) is no tensor of this llama",
        "lm_head.weight has the shape (5, 30), and config.json asks for (97, 30)",
        "model.layers.0.mlp.up_proj.weight is F64",
    ):
        assert expected in found
    assert len(found.splitlines()) == 5


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_size": "wide"}, "hidden_size: model.width = 'wide': must be a whole number"),
        ({"hidden_size": -3}, "hidden_size: model.width = -3: must be greater than 0"),
        ({"hidden_act": "tanh"}, "hidden_act = 'tanh' is none of silu"),
        ({"num_hidden_layers": 10_000}, "config.json says 10,000 layers, and there are 21 tensors"),
        ({"attention_bias": True}, "model.layers.0.self_attn.q_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = {'bits': 4}: llama is read with None alone"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2}},
            "rope_parameters.rope_type = 'longrope' is none of",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_fast": 7}},
            "beta_fast = 7 is read with 32 alone",
        ),
    ],
)
def test_a_config_that_cannot_be(folder: Path, changes: dict[str, Any], expected: str) -> None:
    change(folder, **changes)
    assert expected in message(folder)


def indexed(folder: Path, place: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, place)}))


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("../outside.safetensors", "'../outside.safetensors' is not the name of a file in this folder"),
        ("link.safetensors", "'link.safetensors' is a link that leads out of the folder"),
        ("loop.safetensors", "loop.safetensors"),
        ("pipe.safetensors", "pipe.safetensors is not a regular file"),
        ("gone.safetensors", "gone.safetensors is not there"),
        ("config.json", "'config.json' is no safetensors file"),
        ("\ud800.safetensors", r"'\ud800.safetensors' is not the name of a file in this folder"),
        ("a\nall is well\x1b[31m.safetensors", r"'a\nall is well\x1b[31m.safetensors' is not the name of a file"),
    ],
)
def test_an_index_that_leads_elsewhere(folder: Path, place: str, expected: str) -> None:
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    (folder / "link.safetensors").symlink_to("../outside.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    indexed(folder, place)
    assert expected in message(folder)


def test_a_config_of_many_levels_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    nested = json.dumps(config)[:-1] + ', "more": ' + "[" * 500 + "]" * 500 + "}"
    (folder / "config.json").write_text(nested)
    assert "config.json is nested deeper than 100 levels" in message(folder)


def test_a_name_that_is_no_word_stays_a_line(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"evil\nall is well": np.zeros(1, np.float32)}
    save_file(tensors | {"x" * 10_000: np.zeros(1, np.float32)}, folder / "model.safetensors")
    told = message(folder)
    assert r"'evil\nall is well' (1,) is no tensor of this llama" in told
    assert max(map(len, told.splitlines())) < 500


def test_an_index_that_does_not_agree_with_the_files(folder: Path) -> None:
    indexed(folder, "model.safetensors")
    assert Folder(folder).tensors
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = "model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names tensors that are not there: 'ghost' in 'model.safetensors'" in message(folder)


def test_the_hubs_own_links_are_followed(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert read(snapshot, mesh_of())[0].width == 30


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_halves_are_read_exactly(folder: Path, kind: str) -> None:
    import ml_dtypes

    half = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[kind]
    tensors = load_file(folder / "model.safetensors")
    save_file({name: values.astype(half) for name, values in tensors.items()}, folder / "model.safetensors")
    _, params = read(folder, mesh_of())
    wanted = weight("model.norm.weight", (30,), 0).astype(half).astype(np.float32)
    assert np.array_equal(params["decoder"]["final_norm"]["scale"], wanted)


def test_a_tied_head_may_be_repeated_but_not_differ(folder: Path) -> None:
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight (97, 30) differs from model.embed_tokens.weight" in message(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / "model.safetensors")
    assert read(folder, mesh_of())[0].tied_embeddings


def test_a_model_that_was_saved_without_its_prefix(folder: Path) -> None:
    change(folder, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file({name.removeprefix("model."): values for name, values in tensors.items()}, folder / "model.safetensors")
    assert read(folder, mesh_of())[0].width == 30


def test_large_shards_are_filled_where_they_lie(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import jax

    from transformer.huggingface import folder as folder_module
    from transformer.huggingface import reading

    mesh = mesh_of(fsdp=2, tensor=2)
    expected = read(folder, mesh)[1]
    monkeypatch.setattr(reading, "LARGE", 0)
    monkeypatch.setattr(folder_module, "PORTION", 1000)
    monkeypatch.setattr(folder_module, "SHORTEST_RUN", 16)
    with jax.set_mesh(mesh):  # as where a run begins
        found = read(folder, mesh)[1]
    assert jax.tree.all(jax.tree.map(np.array_equal, found, expected))

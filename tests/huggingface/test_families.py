"""Every family against recorded logits of transformers' own models."""

import json
from pathlib import Path
from typing import Any

import decoder_variants
import jax
import numpy as np
import pytest
from logits import difference, mesh_of, of_texts, our_logits, packed, padded
from references import COLUMNS, REFERENCES, VARIANTS, texts, write_folder

from transformer.huggingface.families import FAMILIES, family_of
from transformer.huggingface.reading import read
from transformer.huggingface.writing import write

SHARDED = ("llama", "gpt2")
"""Those that are also read onto eight devices, which differ from one in what of the files is read."""


SLOW = tuple(name for name in decoder_variants.VARIANTS if not name.startswith(("gemma3", "deepseek")))
"""Those whose tables have nothing by itself that the others have not: a norm's offset, experts, joined and reordered heads."""


def recorded(name: str) -> dict[str, Any]:
    return json.loads((REFERENCES / f"{name}.json").read_text())


def test_every_family_has_a_reference() -> None:
    assert {variant["model_type"] for variant in VARIANTS.values()} == set(FAMILIES)
    assert {path.stem for path in REFERENCES.glob("*.json")} == set(VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference = recorded(name)
    write_folder(tmp_path, reference["config"], reference["shapes"], 0)
    mesh = mesh_of()
    model, params = read(tmp_path, mesh)
    batch = packed(texts(0))
    found = [text[:, :COLUMNS] for text in of_texts(our_logits(model, params, mesh, batch), batch, texts(0), True)]
    assert difference(found, [np.array(text) for text in reference["logits"]]) < 1e-4


@pytest.mark.parametrize("name", SHARDED)
def test_logits_on_eight_devices(name: str, tmp_path: Path) -> None:
    reference = recorded(name)
    write_folder(tmp_path, reference["config"], reference["shapes"], 0)
    mesh = mesh_of(fsdp=2, tensor=2, replica=2)
    model, params = read(tmp_path, mesh)
    batch = padded(texts(0), rows=8)
    found = [text[:, :COLUMNS] for text in of_texts(our_logits(model, params, mesh, batch), batch, texts(0), False)]
    assert difference(found, [np.array(text) for text in reference["logits"]]) < 1e-4


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in VARIANTS])
def test_what_is_written_is_read_again_bit_by_bit(name: str, tmp_path: Path) -> None:
    reference = recorded(name)
    write_folder(tmp_path / "theirs", reference["config"], reference["shapes"], 0)
    mesh = mesh_of(fsdp=2, tensor=2)
    model, params = read(tmp_path / "theirs", mesh)
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of(reference["config"]["model_type"]), model, params, shard_size=20_000)
    again, same = read(tmp_path / "ours", mesh)
    assert again == model
    assert jax.tree.structure(same) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))

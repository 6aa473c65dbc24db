"""Decoders of families after Llama against transformers itself: in, out, and 64 tokens generated greedily."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from decoder_variants import MORE, VARIANTS, from_files
from logits import difference, mesh_of, of_texts, our_logits, packed, padded
from references import texts, their_logits, weight, write_folder

from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.writing import write

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


def greedy(model: Any, prompt: np.ndarray) -> np.ndarray:
    """Returns the prompt and the 64 tokens after it."""
    import torch  # pyright: ignore[reportMissingImports]

    ids = torch.from_numpy(prompt)[None]
    options = {"max_new_tokens": 64, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    return model.generate(ids, **options)[0].numpy()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", [*VARIANTS, *MORE])
def test_in_and_out_again(name: str, seed: int, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = (VARIANTS | MORE)[name]
    theirs, shapes = from_files(config, seed)
    write_folder(tmp_path / "theirs", theirs.config.to_dict(), shapes, seed)
    ids = texts(seed)
    expected = their_logits(theirs, ids)
    mesh = mesh_of()
    model, params = read(tmp_path / "theirs", mesh)
    for is_packed, batch in ((True, packed(ids)), (False, padded(ids))):
        found = of_texts(our_logits(model, params, mesh, batch), batch, ids, is_packed)
        assert difference(found, expected) < 1e-4, is_packed
    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of(config["model_type"]), model, params, shard_size=40_000)
    again, same = read(tmp_path / "ours", mesh)
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    exported, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **eager
    )
    assert not found["missing_keys"] and not found["unexpected_keys"] and not found["mismatched_keys"]
    exported.generation_config.eos_token_id = None
    assert difference(their_logits(exported.eval(), ids), expected) < 1e-6
    text = greedy(exported, ids[1])
    assert len(text) == len(ids[1]) + 64
    np.testing.assert_array_equal(text, greedy(theirs, ids[1]))
    chosen = np.argmax(our_logits(model, params, mesh, padded([text]))[0], axis=-1)
    np.testing.assert_array_equal(chosen[len(ids[1]) - 1 : -1], text[len(ids[1]) :])


def test_seeds_give_other_weights() -> None:
    assert not np.array_equal(weight("a", (3,), 0), weight("a", (3,), 1))

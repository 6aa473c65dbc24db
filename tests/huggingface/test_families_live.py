"""Every family against transformers itself: packed and padded batches, several seeds, in, out and in again. Needs torch."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from logits import difference, mesh_of, of_texts, our_logits, packed, padded
from references import CLASSES, VARIANTS, texts, their_logits, their_model

from transformer.huggingface.families import family_of
from transformer.huggingface.reading import read
from transformer.huggingface.table import Family
from transformer.huggingface.translation import FIXED, HARMLESS
from transformer.huggingface.writing import write

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

OWN = [name for name, config in VARIANTS.items() if config["model_type"] in ("gpt2", "llama", "mistral")]
"""Later decoders, encoders and T5 go in and out in tests of their own, `test_decoders_live` and `test_encoders_live`."""

DECODERS = [name for name, config in VARIANTS.items() if config["model_type"] not in ("bert", "t5", "mt5")]

READ_ELSEWHERE = ("head_dim", "decoder_start_token_id")
"""Keys that transformers' class of a family may not declare: its layers ask for the first, and generation for the second."""

SEEDS = (1, 2, 3)
NEW_TOKENS = 64


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OWN)
def test_in_and_out(name: str, seed: int, tmp_path: Path) -> None:
    model = their_model(VARIANTS[name], seed)
    model.save_pretrained(tmp_path / "theirs")
    ids = texts(seed)
    expected = their_logits(model, ids)
    mesh = mesh_of()
    config, params = read(tmp_path / "theirs", mesh)
    for batch, is_packed in ((packed(ids), True), (padded(ids), False)):
        found = of_texts(our_logits(config, params, mesh, batch), batch, ids, is_packed)
        assert difference(found, expected) < 1e-4
    _assert_padded_batch_of_theirs_agrees(model, ids, expected)

    (tmp_path / "ours").mkdir()
    write(tmp_path / "ours", family_of(VARIANTS[name]["model_type"]), config, params, shard_size=30_000)
    again, same = read(tmp_path / "ours", mesh)
    assert again == config
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    loaded = _loaded(tmp_path / "ours", VARIANTS[name]["model_type"])
    assert difference(their_logits(loaded, ids), expected) < 1e-6
    assert np.array_equal(_greedy(loaded, ids[1]), _greedy(model, ids[1]))


@pytest.mark.parametrize("name", DECODERS)
def test_on_eight_devices(name: str, tmp_path: Path) -> None:
    model = their_model(VARIANTS[name], 0)
    model.save_pretrained(tmp_path)
    mesh = mesh_of(fsdp=2, tensor=2, replica=2)
    config, params = read(tmp_path, mesh)
    batch = padded(texts(0), rows=8)
    found = of_texts(our_logits(config, params, mesh, batch), batch, texts(0), False)
    assert difference(found, their_logits(model, texts(0))) < 1e-4


@pytest.mark.parametrize("model_type", sorted({variant["model_type"] for variant in VARIANTS.values()}))
def test_every_key_of_their_config_is_accounted_for(model_type: str) -> None:
    family = family_of(model_type)
    made = transformers.AutoConfig.for_model(model_type).to_dict()
    unknown = sorted(made.keys() - keys_of(family))
    assert not unknown, unknown


@pytest.mark.parametrize("model_type", sorted({variant["model_type"] for variant in VARIANTS.values()}))
def test_defaults_are_those_of_their_config(model_type: str) -> None:
    made = transformers.AutoConfig.for_model(model_type).to_dict()
    for key in family_of(model_type).keys:
        if not callable(key.default):
            derived = key.default is None  # they fill in what follows from other keys
            if key.theirs not in made:
                assert key.theirs in READ_ELSEWHERE, key
            else:
                assert derived or made[key.theirs] == key.default, key


def keys_of(family: Family) -> set[str]:
    """Returns every key of config.json that the table says something about."""
    told = {key for translation in family.translations for key in translation.theirs}
    return {key.theirs for key in family.keys} | told | {*FIXED, *family.fixed, *family.harmless, *HARMLESS}


def _loaded(path: Path, model_type: str) -> Any:
    kind = getattr(transformers, CLASSES.get(model_type, "AutoModelForCausalLM"))
    loaded, told = kind.from_pretrained(path, attn_implementation="eager", output_loading_info=True)
    assert not any(told.values()), told
    return loaded.eval()


def _greedy(model: Any, ids: np.ndarray) -> np.ndarray:
    room = getattr(model.config, "max_position_embeddings", None) or model.config.n_positions
    count = min(NEW_TOKENS, room - len(ids))
    with torch.no_grad():
        found = model.generate(torch.from_numpy(ids)[None], do_sample=False, max_new_tokens=count, min_new_tokens=count)
    return found[0].numpy()


def _assert_padded_batch_of_theirs_agrees(model: Any, ids: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """So that what ours is compared with does not depend on how they batch."""
    longest = max(map(len, ids))
    inputs = np.stack([np.pad(text, (0, longest - len(text))) for text in ids])
    mask = np.stack([np.pad(np.ones_like(text), (0, longest - len(text))) for text in ids])
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs), attention_mask=torch.from_numpy(mask)).logits.numpy()
    assert difference([logits[row, : len(text)] for row, text in enumerate(ids)], expected) < 1e-5

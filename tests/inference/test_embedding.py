"""Vectors of texts: what is pooled, whatever else is in the batch; and the verb that writes them."""

import io
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import TOKENIZER, build, make_run

from transformer import cli
from transformer.arguments import exit_status
from transformer.config import ConfigError
from transformer.inference.embedding import embed, tokens_of
from transformer.models.parameters import bind
from transformer.models.transformer import apply

pytestmark = pytest.mark.usefixtures("one_device")

TEXTS = ["dead beef", "", "a faded cafe", "bad"]
ENCODER: dict[str, Any] = {"architecture": "encoder", "positions": "learned", "num_positions": 32}


def states_of(model: Any, params: Any, ids: np.ndarray) -> np.ndarray:
    """The hidden states of one text, alone and without padding."""
    batch = {"inputs": ids, "positions": np.arange(len(ids)), "segment_ids": np.ones(len(ids), np.int32)}
    batch = {name: jnp.asarray(array, jnp.int32)[None] for name, array in batch.items()}
    if model.encoder is not None and model.decoder is not None:
        return np.asarray(bind(model, params).read({f"encoder_{name}": x for name, x in batch.items()}).hidden)[0]
    return np.asarray(apply(model, params, batch).hidden)[0]


@pytest.mark.parametrize("architecture", ["encoder", "decoder", "encoder_decoder"])
def test_vectors_are_those_of_each_text_alone(architecture: str) -> None:
    model, params = build(**ENCODER | {"architecture": architecture, "pooler": architecture == "encoder"})
    begin = [] if architecture == "encoder_decoder" else [TOKENIZER.bos]
    for number, text in enumerate(TEXTS[:2]):
        ids = tokens_of(model, TOKENIZER, text)
        assert ids.tolist() == [*begin, *TOKENIZER.encode(text).tolist(), TOKENIZER.eos]
        states = states_of(model, params, ids)
        expected: dict[Any, Any] = {"mean": states.mean(0), "first": states[0], "last": states[-1]}
        if architecture == "encoder":
            expected["pooler"] = np.tanh(states[0] @ params["pooler"]["kernel"])
        for pool, vector in expected.items():
            found = embed(model, params, TOKENIZER, TEXTS, pool=pool, batch_size=2)[number]
            np.testing.assert_allclose(found, vector, rtol=1e-4, atol=1e-5, err_msg=pool)
            unit = embed(model, params, TOKENIZER, TEXTS, pool=pool, normalize=True)[number]
            np.testing.assert_allclose(unit, vector / np.linalg.norm(vector), rtol=1e-4, atol=1e-5, err_msg=pool)


def test_a_text_is_cut_between_its_ends() -> None:
    model, params = build(**ENCODER)
    ids = tokens_of(model, TOKENIZER, "abcdef", 5)
    assert ids.tolist() == [TOKENIZER.bos, *TOKENIZER.encode("abc").tolist(), TOKENIZER.eos]
    long = "a faded cafe " * 5
    with pytest.raises(
        ConfigError, match=r"a text of 67 tokens is longer than model\.num_positions = 32.*max-tokens 32"
    ):
        embed(model, params, TOKENIZER, [long])
    assert embed(model, params, TOKENIZER, [long], max_tokens=32).shape == (1, 16)
    with pytest.raises(ConfigError, match=r"--pool = 'pooler': the model has none"):
        embed(model, params, TOKENIZER, TEXTS, pool="pooler")
    assert embed(model, params, TOKENIZER, []).shape == (0, 16)


def embed_by_command(*arguments: str) -> int:
    return exit_status(cli.run, ["embed", *arguments])


def test_the_verb_writes_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = str(make_run(tmp_path / "run", **ENCODER))
    model, params = build(**ENCODER)
    expected = embed(model, params, TOKENIZER, TEXTS, normalize=True)
    (tmp_path / "texts.txt").write_text("\n".join([*TEXTS, ""]))
    target = tmp_path / "vectors.npy"
    given = ("--workdir", run, "--normalize", "--input", str(tmp_path / "texts.txt"), "--output", str(target))
    assert embed_by_command(*given) == 0
    np.testing.assert_allclose(np.load(target), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr("sys.stdin", io.StringIO("dead beef\n\n"))
    assert embed_by_command("--workdir", run, "--normalize") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["text"] for record in records] == ["dead beef", ""]
    np.testing.assert_allclose([record["embedding"] for record in records], expected[:2], rtol=1e-4, atol=1e-5)


def test_mistakes_of_the_verb_are_told_at_once(tmp_path: Path, capsys: Any) -> None:
    run = str(make_run(tmp_path / "run", **ENCODER))
    wrong = ("--batch-size", "0", "--max-tokens", "1", "--output", "vectors.txt", "--text", "a", "--input", "b")
    assert embed_by_command("--workdir", run, *wrong) == 2
    told = capsys.readouterr().err
    for part in ("--batch-size = 0", "--max-tokens = 1", "must end in .npy or .jsonl", "--text and --input"):
        assert part in told
    assert embed_by_command("--workdir", run, "--input", str(tmp_path / "none.txt")) == 2
    assert "--input = " in capsys.readouterr().err

"""Generation: the cache, batches of prompts, what is never drawn, and text that comes piece by piece."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from transformer.config import Config, ConfigError, ModelConfig, replace
from transformer.data.tokenizers import BOS, EOS, PAD, ByteTokenizer, CharacterTokenizer
from transformer.inference import generate as module
from transformer.inference.generate import generate
from transformer.models.parameters import Tree, init_parameters, map_specs, parameter_specs
from transformer.models.transformer import Outputs, Transformer, apply, empty_cache
from transformer.parallel.sharding import make_mesh, sharding

PROMPTS = ("To be", "", "or not to be, that is the question")


@functools.cache
def build(**changes: Any) -> tuple[Transformer, Tree]:
    """The same model for the same changes: what is compiled for it serves several tests."""
    config = ModelConfig(vocab_size=260, num_layers=2, width=32, num_heads=4, initial_scale=0.2, scan_layers=False)
    model = Transformer(dataclasses.replace(config, **changes))
    return model, init_parameters(model, jax.random.key(3))


@functools.partial(jax.jit, static_argnums=0)
def _uncached(model: Transformer, params: Tree, batch: dict[str, jax.Array]) -> jax.Array:
    outputs = apply(model, params, batch)
    return outputs.logits(outputs.hidden)


def uncached_logits(model: Transformer, params: Tree, tokens: list[int]) -> np.ndarray:
    """Logits of the vocabulary [T, V], from one pass without a cache; padded to one length for all tests."""
    index = np.arange(32)
    batch = {
        "inputs": np.pad(tokens, (0, 32 - len(tokens)))[None].astype(np.int32),
        "positions": np.minimum(index, len(tokens) - 1)[None].astype(np.int32),
        "segment_ids": (index < len(tokens))[None].astype(np.int32),
    }
    return np.array(_uncached(model, params, batch))[0, : len(tokens), : model.config.vocab_size]


@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": True, "num_kv_heads": 2},
        {"positions": "learned", "num_positions": 64, "biases": True},
        {"positions": "sinusoidal", "norm_placement": "post"},
        {"activation": "swiglu", "norm": "rmsnorm", "tied_embeddings": False},
    ],
    ids=["rotary-grouped-scanned", "learned", "sinusoidal-post", "swiglu-rmsnorm-free"],
)
def test_cached_logits_equal_uncached_ones(changes: dict[str, Any]) -> None:
    """Left padding, a prompt of several tokens, then one token at a time: 1e-5 of each array's norm."""
    model, params = build(**changes)
    tokens = np.random.default_rng(0).integers(4, 260, 21)
    expected = uncached_logits(model, params, tokens.tolist())
    cached = jax.jit(lambda params, batch, cache: _with_logits(apply(model, params, batch, cache=cache)))
    padding, prompt = 3, 9
    cache = empty_cache(model, 1, 32)
    found = []
    for begin, end in [(-padding, prompt), *((i, i + 1) for i in range(prompt, len(tokens)))]:
        index = np.arange(begin, end)
        batch = {
            "inputs": np.where(index < 0, PAD, tokens[index])[None].astype(np.int32),
            "positions": np.maximum(index, 0)[None].astype(np.int32),
            "segment_ids": (index >= 0)[None].astype(np.int32),
        }
        logits, cache = cached(params, batch, cache)
        found.append(np.asarray(logits)[0, max(0, -begin) :, :260])
    assert np.linalg.norm(np.concatenate(found) - expected) <= 1e-5 * np.linalg.norm(expected)


def _with_logits(outputs: Outputs) -> tuple[jax.Array, Any]:
    return outputs.logits(outputs.hidden), outputs.cache


def test_greedy_equals_the_argmax_of_the_uncached_model() -> None:
    model, params = build()
    (result,) = generate(model, params, ByteTokenizer(), ["Hamlet: "], 12, temperature=0.0)
    tokens = [BOS, *ByteTokenizer().encode("Hamlet: ").tolist()]
    for token in result.tokens:
        logits = uncached_logits(model, params, tokens)[-1]
        logits[[PAD, BOS]] = -np.inf
        assert token == np.argmax(logits)
        tokens.append(token)
    assert len(result.tokens) == 12 or result.ended


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(temperature: float) -> None:
    """The first row alone, in a batch, and beside other prompts; the same seed gives the same, another one not."""
    model, params = build()

    def run(prompts: tuple[str, ...], seed: int = 7) -> list[tuple[int, ...]]:
        results = generate(model, params, ByteTokenizer(), prompts, 20, temperature=temperature, top_k=50, seed=seed)
        return [result.tokens for result in results]

    together = run(PROMPTS)
    assert run(PROMPTS) == together
    assert run(PROMPTS[:1]) == together[:1]
    assert (
        run((*PROMPTS[:2], "something longer than all of the other prompts together, as it were"))[:2] == together[:2]
    )
    assert len(set(together)) == 3
    assert (run(PROMPTS, seed=8) == together) == (temperature == 0.0)


def test_padding_and_beginnings_are_never_drawn() -> None:
    """With a flat distribution over a vocabulary of few tokens each of them would turn up."""
    tokenizer = CharacterTokenizer("abc")
    model, params = build(vocab_size=tokenizer.vocab_size)
    params = jax.tree.map(jnp.zeros_like, params)
    results = generate(model, params, tokenizer, ["a"] * 64, 20, temperature=1.0)
    drawn = {token for result in results for token in result.tokens}
    assert drawn == set(range(tokenizer.vocab_size)) - {PAD, BOS, EOS}
    assert {result.ended for result in results} == {True, False}
    assert all(len(result.tokens) == 20 or result.ended for result in results)
    assert len({len(result.tokens) for result in results}) > 5, "each row ends where it ends"


def test_text_comes_in_whole_characters() -> None:
    """A character of several bytes comes when its last byte does, and the pieces add up to the text."""
    tokenizer = ByteTokenizer()
    text = module._Text(tokenizer, np.array([BOS, *tokenizer.encode("é: ")]))
    wanted = "aé→𝄞 ß"
    ids = tokenizer.encode(wanted).tolist()
    pieces = [text.add(token, last=False) for token in ids]
    assert [piece for piece in pieces if piece] == list(wanted)
    assert text.add(EOS, last=False) == "" and text.ended
    assert text.add(int(ids[0]), last=False) == "", "nothing after the end"


def test_an_unfinished_character_is_told_at_the_end() -> None:
    tokenizer = ByteTokenizer()
    first, second, third = tokenizer.encode("→").tolist()
    for last_token, is_last in ((second, True), (EOS, False)):
        text = module._Text(tokenizer, np.array([BOS]))
        assert text.add(first, last=False) == ""
        assert text.add(last_token, last=is_last) == "\ufffd"
    text = module._Text(tokenizer, np.array([BOS]))
    assert [text.add(token, last=False) for token in (first, second, third)] == ["", "", "→"]


def test_pieces_add_up_to_the_text() -> None:
    model, params = build()
    pieces: dict[int, list[str]] = {row: [] for row in range(len(PROMPTS))}
    results = generate(
        model,
        params,
        ByteTokenizer(),
        PROMPTS,
        24,
        temperature=1.0,
        on_text=lambda row, piece: pieces[row].append(piece),
    )
    for row, result in enumerate(results):
        assert "".join(pieces[row]) == result.text == ByteTokenizer().decode(result.tokens)
        assert result.prompt == PROMPTS[row]


def test_learned_positions_end() -> None:
    model, params = build(positions="learned", num_positions=16)
    prompt = "0123456789"
    generate(model, params, ByteTokenizer(), [prompt], 5, temperature=0.0)
    with pytest.raises(ConfigError, match=r"11 tokens and 6 new ones .* model.num_positions = 16"):
        generate(model, params, ByteTokenizer(), ["", prompt], 6, temperature=0.0)


def test_other_positions_go_on_beyond_the_training_length() -> None:
    model, params = build()
    assert module.max_new_tokens(model, 1000) is None
    (result,) = generate(model, params, ByteTokenizer(), ["x" * 40], 30, temperature=0.0)
    assert len(result.tokens) == 30 or result.ended


def test_decoding_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace of the prompts and one of the step serve prompts, lengths and settings of about the same size."""
    model, params = build(num_layers=1)
    traces = []
    original = module.apply

    def counted(*args: Any, **values: Any) -> Any:
        traces.append(args[2]["inputs"].shape)
        return original(*args, **values)

    monkeypatch.setattr(module, "apply", counted)
    for seed, (prompt, count) in enumerate([("a", 20), ("quite another", 30), ("", 7)]):
        generate(
            model, params, ByteTokenizer(), [prompt], count, temperature=0.5 + seed, top_k=seed, top_p=0.9, seed=seed
        )
    assert traces == [(1, 32), (1, 1)]


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "replica": 2}], ids=["fsdp", "all"])
def test_on_a_mesh_and_under_a_transfer_guard(axes: dict[str, int]) -> None:
    model, params = build()
    expected = generate(model, params, ByteTokenizer(), PROMPTS, 16, temperature=0.0)
    mesh = make_mesh(replace(Config(), parallel=axes))
    assert isinstance(mesh, Mesh)
    layout = map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape), parameter_specs(model))
    params = jax.device_put(params, layout)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        found = generate(model, params, ByteTokenizer(), PROMPTS, 16, temperature=0.0)
    assert found == expected

"""Drawing: what each token is drawn from, what a row depends on, where a text ends, and what is compiled."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import SEVERAL, TOKENIZER, build, uncached_logits

from transformer.config import Config, ConfigError, replace
from transformer.data.tokenizers import BOS, EOS, PAD
from transformer.inference import generate as module
from transformer.inference.generate import generate
from transformer.inference.prompts import can_generate, max_new_tokens
from transformer.inference.sampling import Sampling
from transformer.inference.text import Generation
from transformer.models.parameters import Tree, map_specs, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import make_mesh, sharding

PROMPTS = ("dead beef", "", "a faded cafe")
GREEDY = Sampling(0.0)


def run(
    model: Transformer, params: Tree, sampling: Sampling, max_tokens: int = 12, prompts: Any = PROMPTS, **options: Any
) -> list[Generation]:
    return generate(model, params, TOKENIZER, prompts, max_tokens, sampling, **options)


def greedy(
    model: Transformer,
    params: Tree,
    prompt: str,
    max_tokens: int = 12,
    prefix: bool = False,
    penalty: float = 1.0,
    begin: str = "",
) -> tuple[int, ...]:
    """The likeliest token of a whole forward pass, again and again."""
    is_read = model.encoder is not None
    tokens = [BOS, *TOKENIZER.encode(begin if is_read else prompt).tolist()]
    start = len(tokens)
    while len(tokens) < start + max_tokens:
        source, seen = prompt if is_read else None, tokens[1:]
        logits = uncached_logits(model, params, [tokens], start if prefix else 0, source)[0, len(tokens) - 1]
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        token = int(np.argmax(logits))
        if token == EOS:
            break
        tokens.append(token)
    return tuple(tokens[start:])


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"layers": "attention.window", "window": 4, "num_sinks": 2, "num_layers": 2}, {"prefix": True}),
        ({"architecture": "encoder_decoder", "positions": "learned", "num_positions": 32}, {"begin": "bad"}),
    ],
    ids=["decoder", "prefix, window and sinks", "encoder-decoder with a begin"],
)
def test_greedy_is_the_likeliest_token_of_a_forward_pass(changes: dict[str, Any], options: dict[str, Any]) -> None:
    """Prompts of different lengths side by side. A prompt seen both ways is another one."""
    model, params = build(**changes)
    found = [text.tokens for text in run(model, params, GREEDY, **options)]
    assert found == [greedy(model, params, prompt, **options) for prompt in PROMPTS]
    assert len(set(found)) == 3 and max(map(len, found)) > 2
    if options:
        assert [greedy(model, params, prompt) for prompt in PROMPTS] != found


def test_a_repetition_penalty_counts_prompt_and_text() -> None:
    model, params = build()
    found = [text.tokens for text in run(model, params, Sampling(0.0, repetition_penalty=3.0))]
    assert found == [greedy(model, params, prompt, penalty=3.0) for prompt in PROMPTS]
    assert found != [text.tokens for text in run(model, params, GREEDY)]


@pytest.mark.parametrize("changes", [{"architecture": "encoder"}, {"num_labels": 3}], ids=["encoder", "classifier"])
def test_what_writes_no_text(changes: dict[str, Any]) -> None:
    model, params = build(**changes)
    assert not can_generate(model) and can_generate(build()[0])
    with pytest.raises(ConfigError, match=r"cannot generate: .* writes no text"):
        run(model, params, GREEDY)


def test_a_stop_string_ends_its_row_alone() -> None:
    """Also one that lies over a boundary of what the device draws at a time; pieces, where asked for, add up."""
    model, params = build()
    plain = run(model, params, Sampling(1.5), 30)
    longest = max(plain, key=lambda result: len(result.text)).text
    for stop in (longest[3:5], longest[15:18]):
        pieces = [""] * len(PROMPTS)

        def collect(row: int, piece: str, pieces: list[str] = pieces) -> None:
            pieces[row] += piece

        found = run(model, params, Sampling(1.5), 30, stop=[stop], on_text=collect)
        assert pieces == [result.text for result in found] == [result.text.partition(stop)[0] for result in plain]
        assert found == run(model, params, Sampling(1.5), 30, stop=[stop])
        assert [text.ended for text in found] == [old.ended or stop in old.text for old in plain]


def cut(plain: list[Generation]) -> list[tuple[tuple[int, ...], bool]]:
    """Returns tokens, and whether they ended, of texts that end at an a, too."""
    (a,) = TOKENIZER.encode("a").tolist()
    return [
        (text.tokens[: text.tokens.index(a)], True) if a in text.tokens else (text.tokens, text.ended) for text in plain
    ]


def test_any_of_several_ends_is_one() -> None:
    model, params = build()
    plain = [text for seed in range(4) for text in run(model, params, Sampling(1.5), 12, seed=seed)]
    found = [
        text for seed in range(4) for text in generate(model, params, SEVERAL, PROMPTS, 12, Sampling(1.5), seed=seed)
    ]
    assert [(text.tokens, text.ended) for text in found] == cut(plain)
    assert sum(one.tokens != other.tokens for one, other in zip(found, plain, strict=True)) > 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(temperature: float) -> None:
    """A row alone, in a batch, and beside longer prompts; the same numbers give the same, other numbers or seeds not."""
    model, params = build()
    sampling = Sampling(temperature, top_k=9)

    def tokens(prompts: Any, seed: int = 7, rows: Any = None) -> list[tuple[int, ...]]:
        return [text.tokens for text in run(model, params, sampling, 12, prompts, seed=seed, rows=rows)]

    together = tokens(PROMPTS)
    assert tokens(PROMPTS) == together and len(set(together)) == 3
    assert tokens(PROMPTS[::-1], rows=[(2, 0), (1, 0), (0, 0)]) == together[::-1], "a row is its numbers"
    assert tokens(("bad " * 9, PROMPTS[1]), rows=[(3, 0), (1, 0)])[1] == together[1]
    assert (tokens(PROMPTS, seed=8) == together) == (temperature == 0)
    assert (tokens(PROMPTS, rows=[(0, 1), (1, 1), (2, 1)]) == together) == (temperature == 0)


def test_padding_and_beginnings_are_never_drawn() -> None:
    """With a distribution that is nearly flat each of them would turn up."""
    model, params = build()
    results = [text for seed in range(20) for text in run(model, params, Sampling(100.0), 30, seed=seed)]
    drawn = {token for result in results for token in result.tokens}
    assert drawn == set(range(TOKENIZER.vocab_size)) - {PAD, BOS, EOS}
    assert {result.ended for result in results} == {True, False}
    assert all(len(result.tokens) == 30 or result.ended for result in results)
    assert len({len(result.tokens) for result in results[:3]}) > 1, "each row ends where it ends"


def test_learned_positions_end() -> None:
    model, params = build(positions="learned", num_positions=16)
    with pytest.raises(ConfigError, match=r"10 tokens and 7 new ones .* model.num_positions = 16"):
        run(model, params, GREEDY, 7, ["", "dead beef"])
    assert [max_new_tokens(other, 10) for other in (model, build()[0])] == [6, None]


def test_each_loop_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One trace of the prompts and one of the loop serve prompts, lengths, settings and stops of about the same size."""
    model, params = build(seed=4, width=8)
    traces = []
    original = module.apply

    def counted(*args: Any, **values: Any) -> Any:
        traces.append(args[2]["inputs"].shape)
        return original(*args, **values)

    monkeypatch.setattr(module, "apply", counted)
    for number, (prompt, count) in enumerate([("a", 20), ("bed and beef", 30), ("", 7)]):
        sampling = Sampling(0.5 + number, number, 0.9, min_p=0.1 * number, repetition_penalty=1.0 + number)
        run(model, params, sampling, count, [prompt], seed=number, stop=("x",) * number)
    assert traces == [(1, 32), (1, 1)]


def test_on_a_mesh_and_under_a_transfer_guard() -> None:
    model, params = build()
    expected = run(model, params, GREEDY)
    mesh = make_mesh(replace(Config(), parallel={"fsdp": 2, "tensor": 2, "replica": 2}))
    assert isinstance(mesh, Mesh)
    layout = map_specs(lambda spec: sharding(mesh, spec.axes, spec.shape), parameter_specs(model))
    params = jax.device_put(params, layout)
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        found = run(model, params, GREEDY, stop=["zz"])
    assert found == expected

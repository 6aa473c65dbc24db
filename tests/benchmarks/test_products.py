"""Chains of products that wait for each other, in programs whose chains are known, and in models."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from transformer.benchmarks.products import Work, longest_chain, work_of_products
from transformer.config import ModelConfig
from transformer.models.parameters import abstract_parameters
from transformer.models.transformer import Transformer, apply

X, W = jax.ShapeDtypeStruct((4, 8), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.float32)


def text_of(function: Callable[..., Any], *arguments: Any) -> str:
    """The compiled program."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    assert text is not None
    return text


def repeated(step: Callable[[Any, Any], Any], turns: int, x: Any) -> Any:
    return jax.lax.fori_loop(0, turns, lambda turn, h: step(turn, h), x)


PROGRAMS: dict[str, tuple[Callable[[Any, Any], Any], int]] = {
    "no product": (lambda x, w: jnp.sum(x) + w, 0),
    "one after another": (lambda x, w: jnp.tanh(x @ w) @ w @ w, 3),
    "side by side": (lambda x, w: (x @ w) + (x @ w.T), 1),
    "a state through a loop": (lambda x, w: repeated(lambda turn, h: jnp.tanh(h @ w), 10, x), 10),
    "twice in a turn": (lambda x, w: repeated(lambda turn, h: jnp.tanh(h @ w) @ w, 7, x), 14),
    "a sum in a loop": (lambda x, w: repeated(lambda turn, h: h + x * turn @ w, 10, x), 1),
    "a sum, used": (lambda x, w: repeated(lambda turn, h: h + x * turn @ w, 10, x) @ w, 2),
    "two states that swap": (
        lambda x, w: jax.lax.fori_loop(0, 9, lambda turn, pair: (pair[1], jnp.tanh(pair[0] @ w)), (x, 2 * x)),
        5,
    ),
    "outputs of a scan": (lambda x, w: jax.lax.scan(lambda s, y: (s + 1, y @ w), 0.0, jnp.stack([x] * 5)), 1),
    "a loop in a loop": (
        lambda x, w: repeated(lambda turn, h: repeated(lambda turn, h: jnp.tanh(h @ w), 3, h), 4, x),
        12,
    ),
    "the longer branch": (
        lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w, x) @ w,
        3,
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_chains_that_are_known(name: str) -> None:
    function, expected = PROGRAMS[name]
    assert longest_chain(text_of(function, X, W)) == expected


def test_a_loop_whose_turns_nobody_knows_is_told() -> None:
    def function(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda h: jnp.sum(h) < 9, lambda h: h @ w, x)

    with pytest.raises(ValueError, match=r"how often the loop .* turns is not known"):
        longest_chain(text_of(function, X, W))


def chain_of(length: int, **changes: Any) -> int:
    shape = {"num_layers": 2, "width": 16, "num_heads": 2, "scan_layers": False, "positions": "none"}
    model = Transformer(ModelConfig(vocab_size=32, **shape | changes))
    names = ("inputs", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((1, length), jnp.int32) for name in names}

    def loss(params: Any, batch: Any) -> Any:
        outputs = apply(model, params, batch)
        return jnp.sum(jnp.square(outputs.logits(outputs.hidden)))

    return longest_chain(text_of(jax.grad(loss), abstract_parameters(model), batch))


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_implementation": "reference"},
        {"attention_implementation": "causal_blocks"},
        pytest.param({"layers": "mingru/none"}, marks=pytest.mark.slow),
    ],
    ids=["attention", "attention in blocks", "minGRU"],
)
def test_a_parallel_model_waits_no_longer_for_a_longer_text(changes: dict[str, Any]) -> None:
    assert chain_of(16, **changes) == chain_of(48, **changes) < 40


@pytest.mark.parametrize("mixer", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_a_recurrent_network_waits_for_every_token_forward_and_back(mixer: str) -> None:
    """Through all tokens of one layer and of the other, and back through both."""
    short, long = (chain_of(length, layers=f"{mixer}/none") for length in (16, 48))
    products = 1 if mixer == "lstm" else 2
    assert 2 * (48 - 16) <= long - short <= 2 * 2 * products * (48 - 16)


WORK: dict[str, tuple[Callable[[Any, Any], Any], Work]] = {
    "no product": (lambda x, w: jnp.sum(x) + w, Work()),
    "one": (lambda x, w: x @ w, Work(2 * 4 * 8 * 8, 4 * (32 + 64 + 32))),
    "each turn of a loop": (
        lambda x, w: repeated(lambda turn, h: jnp.tanh(h @ w), 10, x),
        Work(10 * 2 * 4 * 8 * 8, 10 * 4 * (32 + 64 + 32)),
    ),
    "a batch of products": (
        lambda x, w: jnp.einsum("bij,bjk->bik", jnp.stack([x, 2 * x, 3 * x]), jnp.stack([w, w + 1, w + 2])),
        Work(3 * 2 * 4 * 8 * 8, 3 * 4 * (32 + 64 + 32)),
    ),
    "the larger branch": (
        lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ w) @ w, lambda x: x @ w, x),
        Work(2 * 2 * 4 * 8 * 8, 2 * 4 * (32 + 64 + 32)),
    ),
}


@pytest.mark.parametrize("name", WORK)
def test_work_that_is_known(name: str) -> None:
    function, expected = WORK[name]
    assert work_of_products(text_of(function, X, W)) == expected

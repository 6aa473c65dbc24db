"""The configuration: one place for defaults, help for every key, derived values."""

import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

import pytest

from transformer.config import (
    Config,
    ModelConfig,
    first_example,
    get,
    keys,
    microbatch_starts,
    num_microbatches,
    problems_of,
    replace,
    type_of,
    validate,
    warmup_steps,
)

ROOT = Path(__file__).parents[2]
SECTIONS = [item for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)]


# Keys.


def test_defaults_are_valid() -> None:
    assert problems_of(Config()) == []
    assert validate(Config(), 1) == Config()


def test_every_key_has_help_a_type_and_a_default() -> None:
    """A field's docstring is its help text: one sentence at least, with a full stop."""
    for kind in (Config, *(typing.cast(type, item.type) for item in SECTIONS)):
        (body,) = ast.parse(inspect.getsource(kind)).body
        assert isinstance(body, ast.ClassDef)
        for this, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(this, ast.AnnAssign) and ast.unparse(this.target) not in {item.name for item in SECTIONS}:
                assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), ast.unparse(this)
                text = str(following.value.value)
                assert len(text) >= 10 and text.endswith("."), (ast.unparse(this), text)
                assert this.value is not None, ast.unparse(this)
    assert {key.partition(".")[0] for key in keys() if "." in key} == {item.name for item in SECTIONS}
    assert all(type_of(key) is not None and get(Config(), key) is not Ellipsis for key in keys())


def test_defaults_stand_nowhere_else() -> None:
    """No fallback beside the declared default: neither `getattr` with a third argument nor `.get` on a configuration."""
    found = []
    for path in (ROOT / "transformer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            fallback = isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3
            lookup = isinstance(node.func, ast.Attribute) and node.func.attr == "get"
            about = [ast.unparse(node.args[0])] if fallback else []
            about += [ast.unparse(node.func.value)] if lookup and isinstance(node.func, ast.Attribute) else []
            names = [item.name for item in SECTIONS]
            if any(text.split(".")[-1] in ("config", *names) for text in about) and path.parent.name != "config":
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


def test_configuration_cannot_be_changed() -> None:
    for part in (Config(), Config().model):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 3  # pyright: ignore


def test_replace_goes_one_level_deep() -> None:
    config = replace(Config(), model={"width": 128}, seed=4)
    assert (config.model.width, config.seed) == (128, 4)
    assert config.model.num_layers == Config().model.num_layers
    assert config.data is Config().data or config.data == Config().data


# Derived values.


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 1024), ({"activation": "swiglu"}, 704), ({"activation": "geglu", "feedforward_width": 9}, 9)],
)
def test_feedforward_width(changes: dict[str, Any], expected: int) -> None:
    """8 / 3 of 256 is 682.7, up to a multiple of 64: 704."""
    assert ModelConfig(width=256, **changes).ff_width == expected


@pytest.mark.parametrize(("vocab", "rows"), [(1, 128), (128, 128), (129, 256), (50_257, 50_304)])
def test_vocabulary_is_padded(vocab: int, rows: int) -> None:
    assert ModelConfig(vocab_size=vocab).vocab_rows == rows


def test_warmup_in_steps_or_tokens() -> None:
    size = {"train": {"batch_size": 4}, "data": {"sequence_length": 10}}
    assert warmup_steps(replace(Config(), **size, optimizer={"warmup_steps": 7})) == 7
    assert warmup_steps(replace(Config(), **size, optimizer={"warmup_tokens": 80})) == 2
    assert warmup_steps(replace(Config(), **size, optimizer={"warmup_tokens": 81})) == 3

    # Of batches of 1, 2, 3, 4 and then 4 examples.
    growing = {"batch_size": 4, "num_microbatches": 4, "batch_warmup_steps": 3}
    for tokens, steps in ((0, 0), (1, 1), (10, 1), (11, 2), (30, 2), (31, 3), (100, 4), (101, 5), (10**30, 2**31)):
        config = replace(Config(), **size | {"train": growing}, optimizer={"warmup_tokens": tokens})
        assert warmup_steps(config) == steps


@pytest.mark.parametrize(("parts", "warmup"), [(1, 0), (4, 0), (2, 1), (2, 5), (5, 7), (8, 3), (6, 1000)])
def test_a_batch_grows_by_microbatches(parts: int, warmup: int) -> None:
    train = {"batch_size": 3 * parts, "num_microbatches": parts, "batch_warmup_steps": warmup}
    config = replace(Config(), train=train)
    seen = 0
    for step in range(warmup + 3):
        expected = min(parts, 1 + (parts - 1) * step // warmup) if warmup else parts
        assert num_microbatches(config, step) == expected
        assert first_example(config, step) == seen
        seen += 3 * expected
    far = 2**31 - 1
    assert first_example(config, far) == seen + (far - warmup - 3) * 3 * parts
    assert microbatch_starts(config) == tuple(
        next(step for step in range(warmup + 1) if num_microbatches(config, step) > part) for part in range(parts)
    )

"""Configurations as JSON, and files that are whole or not there."""

import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
from changes import changed

from transformer.config import (
    Config,
    ConfigError,
    from_json,
    from_tree,
    get,
    keys,
    replace,
    serialization,
    to_json,
    type_of,
    write_atomically,
)

# JSON.


def test_json_there_and_back() -> None:
    config = replace(
        Config(),
        data={"path": ("a", "b\n√"), "weights": (0.25,), "validation_tail": 0.3},
        model={"vocab_size": 7, "scan_layers": True},
        optimizer={"learning_rate": 1 / 3},
        seed=2**32 - 1,
    )
    text = to_json(config)
    assert from_json(text) == config
    assert to_json(from_json(text)) == text
    written = json.loads(text)
    for key in keys():
        node = written
        for part in key.split("."):
            node = node[part]
    assert hash(from_json(text)) == hash(config), "lists have become tuples"


def _other(key: str) -> Any:
    """A value of a key's type that is not its default, where there is another."""
    kind, default = type_of(key), get(Config(), key)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return next((choice for choice in arguments if choice != default), default)
    if arguments and typing.get_origin(arguments[0]) is Literal:
        return typing.get_args(arguments[0])[0]
    if typing.get_origin(kind) is tuple:
        return (0.5, 2.0) if arguments[0] is float else ("ä\n\"'\\", "b c")
    base = next(argument for argument in arguments if argument is not type(None)) if arguments else kind
    return {bool: not default, int: 123, float: 0.1 + 0.2, str: "tëxt\t\u2028\0"}[base]


def test_json_gives_back_every_key() -> None:
    config = Config()
    for key in keys():
        config = changed(key, _other(key), config)
    assert [key for key in keys() if get(config, key) == get(Config(), key)] == []
    assert from_json(to_json(config)) == config


def test_missing_keys_take_their_defaults_and_whole_numbers_are_floats() -> None:
    config = from_json('{"optimizer": {"learning_rate": 1}, "data": {"weights": [1, 2]}}')
    assert config == replace(Config(), optimizer={"learning_rate": 1.0}, data={"weights": (1.0, 2.0)})
    assert isinstance(config.optimizer.learning_rate, float) and isinstance(config.data.weights[0], float)


def test_every_mistake_of_a_file_is_told() -> None:
    tree = {
        "modle": {"width": 3},
        "model": {"widht": 3, "num_layers": "four", "biases": 1, "num_heads": 4.0, "vocab_size": True},
        "optimizer": {"schedule": "cosin", "learning_rate": None},
        "data": {"path": "a.txt", "weights": [1, "x"]},
        "train": 3,
    }
    with pytest.raises(ConfigError) as raised:
        from_json(json.dumps(tree), "run/config.json")
    problems = raised.value.problems
    assert all(problem.startswith("run/config.json: ") for problem in problems)
    expected = [
        "modle is not a key",
        "model.widht is not a key (did you mean model.width?)",
        "model.num_layers = 'four': must be a whole number",
        "model.biases = 1: must be True or False",
        "model.num_heads = 4.0: must be a whole number",
        "model.vocab_size = True: must be a whole number or None",
        "optimizer.schedule = 'cosin': must be one of cosine, linear, wsd, inverse_sqrt, constant (did you mean cosine?)",
        "optimizer.learning_rate = None: must be a number",
        "data.path = 'a.txt': must be any number of values, each text",
        "data.weights = (1.0, 'x'): must be any number of values, each a number",
        "train must be an object, not 3",
    ]
    assert len(problems) == len(expected)
    for text in expected:
        assert any(text in problem for problem in problems), (text, problems)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('"seed": null', "seed = None: must be a whole number"),
        ('"seed": true', "seed = True: must be a whole number"),
        ('"sed": 1', "sed is not a key (did you mean seed?)"),
        ('"width": 5', "width is not a key (did you mean model.width?)"),
        ('"model": {"qqqqqq": 5}', "model.qqqqqq is not a key"),
        ('"model": {"scan_layers": 1}', "model.scan_layers = 1: must be True or False or None"),
        ('"model": {"dropout": true}', "model.dropout = True: must be a number"),
        (
            '"model": {"activation": {"a": [1]}}',
            "model.activation = {'a': [1]}: must be one of gelu, gelu_exact, relu, relu_squared, silu, swiglu, geglu, reglu",
        ),
        ('"data": {"path": [1]}', "data.path = (1,): must be any number of values, each text"),
        ('"data": {"weights": [[1]]}', "data.weights = ((1,),): must be any number of values, each a number"),
        ('"data": {"validation_tail": []}', "data.validation_tail = (): must be a number or None"),
        ('"data": {"cache_dir": null}', "data.cache_dir = None: must be text"),
        ('"optimizer": {"epsilon": 1' + "0" * 400 + "}", f"optimizer.epsilon = {10**400}: must be a number"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_key_or_type_is_told_in_one_sentence(text: str, sentence: str) -> None:
    assert from_tree(json.loads(f"{{{text}}}")) == (Config(), [sentence])


def test_what_is_wrong_takes_its_default() -> None:
    config, problems = from_tree({"model": {"width": "x", "num_layers": 3}})
    assert config == replace(Config(), model={"num_layers": 3}) and len(problems) == 1


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3", "[" * 100_000, '{"seed": ' + "1" * 5000 + "}"])
def test_what_is_not_a_configuration(text: str) -> None:
    with pytest.raises(ConfigError, match=r"here\.json"):
        from_json(text, "here.json")


# Files.


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "file.json"
    write_atomically(path, "before")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(serialization.os, "fsync", lambda handle: (_ for _ in ()).throw(OSError("no space")))
        write_atomically(path, "after")
    assert path.read_text() == "before"
    assert list(path.parent.iterdir()) == [path]
    write_atomically(path, b"after")
    assert path.read_text() == "after" and path.stat().st_mode & 0o777 == 0o644

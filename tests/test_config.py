"""The configuration: one place for defaults, help for every key, every mistake at once, JSON and back."""

import ast
import dataclasses
import inspect
import json
import typing
from pathlib import Path
from typing import Any, Literal

import pytest

from transformer.config import (
    Config,
    ConfigError,
    DataConfig,
    LayerKind,
    ModelConfig,
    first_example,
    from_json,
    from_tree,
    get,
    keys,
    known_vocab_size,
    mentioned,
    mesh_axes,
    mesh_problems,
    microbatch_starts,
    nearest,
    num_microbatches,
    parse_layers,
    problems_of,
    replace,
    serialization,
    to_json,
    type_of,
    validate,
    validation,
    warmup_steps,
    write_atomically,
)

ROOT = Path(__file__).parent.parent
SECTIONS = [item for item in dataclasses.fields(Config) if dataclasses.is_dataclass(item.type)]


def changed(key: str, value: Any, start: Config | None = None) -> Config:
    section, _, name = key.rpartition(".")
    change: dict[str, Any] = {section: {name: value}} if section else {name: value}
    return replace(start or Config(), **change)


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


# Validation. Each case is one mistake, and gives one message that names its keys.

POSITIVE = (
    "data.sequence_length data.tokenizer_vocab_size data.prefetch_batches model.num_layers model.width model.num_heads "
    "model.num_kv_heads model.head_width model.feedforward_width model.vocab_size model.num_positions "
    "model.norm_epsilon model.rotary_base model.initial_scale optimizer.learning_rate optimizer.epsilon "
    "train.num_steps train.batch_size train.num_microbatches train.max_nonfinite_steps train.log_every_steps "
    "evaluation.batch_size checkpoint.keep_latest model.chunk_length model.state_width model.convolution_width "
    "model.num_features"
).split()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        *((key, 0, "must be greater than 0") for key in POSITIVE),
        *((key, -2, "must be greater than 0") for key in POSITIVE),
        *((key, -1, "must not be negative") for key in validation._NOT_NEGATIVE),
        *((key, 1.5, "must be a share") for key in validation._SHARES),
        *((key, -0.1, "must be a share") for key in validation._SHARES),
        *((key, 0, "or -1") for key in ("parallel.replica", "parallel.fsdp", "parallel.tensor")),
        *((key, -2, "or -1") for key in validation._LEAST_OR_MINUS_ONE),
        *((key, 2**32, "must be at most") for key in validation._LARGEST),
        *((key, float("nan"), "finite") for key in keys() if type_of(key) is float),
        *((key, float("inf"), "finite") for key in keys() if type_of(key) is float),
    ],
)
def test_ranges(key: str, value: Any, expected: str) -> None:
    (problem,) = problems_of(changed(key, value))
    assert problem.startswith(f"{key} = {value}: ") and expected in problem


@pytest.mark.parametrize("key", [key for key in keys() if type_of(key) in (int, float)])
def test_every_number_has_a_range(key: str) -> None:
    """A new key must say what it allows: some number is refused for every numeric key."""
    extremes = (-(10**6), 10**12) if type_of(key) is int else (-1e6, 1e12)
    unbounded = {"model.rotary_base"}
    assert key in unbounded or any(problems_of(changed(key, value)) for value in extremes), key


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": {"num_heads": 3}}, ["model.width = 256", "model.num_heads = 3"]),
        ({"model": {"num_heads": 4, "num_kv_heads": 3}}, ["model.num_heads = 4", "model.num_kv_heads = 3"]),
        ({"model": {"head_width": 31}}, ["model.positions = 'rotary'", "even", "31"]),
        ({"model": {"positions": "sinusoidal", "width": 255, "num_heads": 5}}, ["model.width", "255", "even"]),
        (
            {"model": {"positions": "learned", "num_positions": 100}},
            ["data.sequence_length = 256", "model.num_positions = 100"],
        ),
        ({"model": {"vocab_size": 100}}, ["model.vocab_size = 100", "4096"]),
        ({"model": {"vocab_size": 259}, "data": {"tokenizer": "bytes"}}, ["model.vocab_size = 259", "260"]),
        ({"optimizer": {"warmup_steps": 5, "warmup_tokens": 5}}, ["optimizer.warmup_steps", "optimizer.warmup_tokens"]),
        ({"optimizer": {"warmup_steps": 1001}}, ["1001", "train.num_steps = 1000"]),
        (
            {"optimizer": {"schedule": "wsd", "warmup_steps": 900}},
            ["optimizer.schedule = 'wsd'", "900", "200", "optimizer.decay_share", "train.num_steps = 1000"],
        ),
        ({"optimizer": {"name": "schedule_free"}}, ["optimizer.schedule = 'cosine'", "schedule_free", "constant"]),
        (
            {"optimizer": {"name": "schedule_free", "schedule": "constant", "beta1": 0.0}},
            ["optimizer.beta1 = 0.0", "schedule_free"],
        ),
        (
            {"optimizer": {"name": "schedule_free", "schedule": "constant", "ema_decay": 0.9}},
            ["optimizer.ema_decay = 0.9", "schedule_free"],
        ),
        (
            {"optimizer": {"name": "sgd"}, "model": {"parametrization": "mup"}},
            ["optimizer.name = 'sgd'", "model.parametrization = 'mup'"],
        ),
        ({"train": {"batch_warmup_steps": 10}}, ["train.batch_warmup_steps = 10", "train.num_microbatches = 1"]),
        (
            {"train": {"batch_warmup_steps": 1001, "num_microbatches": 4}},
            ["train.batch_warmup_steps = 1001", "train.num_steps = 1000"],
        ),
        ({"train": {"num_microbatches": 3}}, ["train.batch_size = 16", "train.num_microbatches = 3"]),
        ({"parallel": {"fsdp": 3}}, ["train.batch_size", "16", "parallel.fsdp"]),
        ({"parallel": {"fsdp": 2, "replica": 8}, "evaluation": {"batch_size": 24}}, ["evaluation.batch_size = 24"]),
        ({"parallel": {"tensor": -1}}, ["parallel.fsdp", "parallel.tensor", "-1"]),
        ({"parallel": {"coordinator": "host:1", "num_processes": 2}}, ["parallel.process_id", "together"]),
        ({"parallel": {"coordinator": "host", "num_processes": 1, "process_id": 0}}, ["'host'", "HOST:PORT"]),
        (
            {"parallel": {"coordinator": "host:1", "num_processes": 2, "process_id": 2}},
            ["parallel.process_id = 2", "parallel.num_processes = 2"],
        ),
        ({"data": {"source": ()}}, ["data.source", "data.path"]),
        ({"data": {"source": ("python_stdlb",)}}, ["'python_stdlb'", "did you mean python_stdlib"]),
        ({"data": {"source": ("tfds",)}}, ["'tfds'", "tfds:NAME"]),
        ({"data": {"source": ("tfds:",)}}, ["'tfds:'", "tfds:NAME"]),
        ({"data": {"weights": (1.0, 2.0)}}, ["data.weights", "2", "1 source"]),
        ({"data": {"weights": (0.0,)}}, ["data.weights", "greater than 0"]),
        ({"data": {"weights": (float("nan"),)}}, ["data.weights", "finite"]),
        ({"data": {"tokenizer": "huggingface"}}, ["data.tokenizer_path"]),
        ({"data": {"tokenizer": "bytes", "tokenizer_path": "x"}}, ["data.tokenizer_path = 'x'", "bytes"]),
        (
            {"model": {"architecture": "encoder", "layers": "attention+mamba2"}, "objective": {"name": "masked_lm"}},
            ["model.layers = 'attention+mamba2'", "mamba2", "encoder"],
        ),
        (
            {
                "model": {"architecture": "encoder_decoder", "layers": "mamba2", "encoder_layers": "retention"},
                "objective": {"name": "span_corruption"},
            },
            ["model.encoder_layers = 'retention'", "encoder"],
        ),
        ({"model": {"layers": "performer.window"}}, ["model.layers = 'performer.window'", "such as window"]),
        (
            {"model": {"layers": "linear_attention"}, "objective": {"name": "prefix_lm"}},
            ["model.layers = 'linear_attention'", "objective.name = 'prefix_lm'"],
        ),
        ({"model": {"layers": "retention", "state_width": 7}}, ["model.layers = 'retention'", "'rotary'", "7"]),
        (
            {"model": {"layers": "2*gated_delta_net", "positions": "alibi"}},
            ["model.layers = '2*gated_delta_net'", "model.positions = 'alibi'"],
        ),
        ({"evaluation": {"sample_prompt": "\udcff"}}, ["evaluation.sample_prompt", "UTF-8"]),
    ],
)
def test_keys_that_contradict_each_other(changes: dict[str, Any], named: list[str]) -> None:
    (problem,) = problems_of(replace(Config(), **changes))
    assert all(part in problem for part in named), problem


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"num_heads": 3, "head_width": 64}},
        {"model": {"num_heads": 4, "num_kv_heads": 1}},
        {"model": {"num_positions": 100}},
        {"model": {"vocab_size": 5000}},
        {"data": {"path": ("a.txt",), "source": ("nonsense",)}},
        {"data": {"source": ("python_stdlib", "hf:x/y", "local_text:*.txt", "tfds:c4/en"), "weights": (1.0,) * 4}},
        {"optimizer": {"final_ratio": 1.0}},
        {"optimizer": {"schedule": "wsd", "warmup_steps": 800}},
        {"optimizer": {"warmup_steps": 1000}},
        {"optimizer": {"name": "schedule_free", "schedule": "constant"}, "model": {"parametrization": "mup"}},
        {"train": {"batch_warmup_steps": 1000, "num_microbatches": 2}},
        {"parallel": {"coordinator": "host:1", "num_processes": 2, "process_id": 0}},
        {"parallel": {"fsdp": 1, "tensor": -1}},
        {"model": {"layers": "gated_delta_net+attention", "positions": "relative"}},
        {
            "model": {"architecture": "encoder_decoder", "layers": "mamba2", "encoder_layers": "attention"},
            "objective": {"name": "span_corruption"},
        },
        {"data": {"validation_tail": 0.1}, "model": {"dropout": 0.0}},
    ],
)
def test_what_is_allowed(changes: dict[str, Any]) -> None:
    assert problems_of(replace(Config(), **changes)) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.dropout": 1.0}, "model.dropout = 1.0: must be a share, at least 0 and below 1"),
        ({"seed": 2**32}, "seed = 4294967296: must be at most 4294967295"),
        ({"parallel.process_id": -2}, "parallel.process_id = -2: must be at least 0, or -1"),
        (
            {"data.source": ("python_stdlib", "tdfs:lm1b")},
            "data.source = 'tdfs:lm1b': must be one of python_stdlib, local_text:PATH, tfds:NAME, hf:NAME "
            "(did you mean tfds?)",
        ),
        ({"data.weights": (1.0, 2.0), "data.path": ("a", "b")}, "data.weights has 2 numbers for 1 sources"),
        ({"data.weights": (float("inf"),)}, "data.weights = (inf,): each must be a finite number greater than 0"),
        (
            {"model.width": 36},
            "model.positions = 'rotary' needs an even head width, not 9 "
            "(model.head_width, or model.width / model.num_heads)",
        ),
        (
            {"model.vocab_size": 299, "data.tokenizer": "unigram", "data.tokenizer_vocab_size": 300},
            "model.vocab_size = 299 is smaller than the tokenizer's 300 tokens: give at least that, or leave it out",
        ),
        (
            {"optimizer.warmup_tokens": 16 * 256 * 1000 + 1, "optimizer.schedule": "wsd"},
            "the warm-up of 1001 steps (optimizer.warmup_steps, optimizer.warmup_tokens) is longer than "
            "train.num_steps = 1000",
        ),
        (
            {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 801},
            "optimizer.schedule = 'wsd': the warm-up (801 steps) and decay (200, optimizer.decay_share) overlap in "
            "train.num_steps = 1000",
        ),
        (
            {"parallel.fsdp": 8, "train.num_microbatches": 4},
            "train.batch_size / train.num_microbatches = 4 is not divisible by the 8 data-parallel devices "
            "(parallel.replica x parallel.fsdp)",
        ),
        ({"parallel.tensor": -1}, "parallel.fsdp = parallel.tensor = -1: only one axis can be what the others leave"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    config = Config()
    for key, value in changes.items():
        config = changed(key, value, config)
    assert problems_of(config) == [sentence]
    assert mentioned(sentence) & changes.keys(), "it names a key that was changed"


def test_all_mistakes_at_once() -> None:
    config = replace(
        Config(),
        model={"num_heads": 7, "dropout": 1.0},
        optimizer={"learning_rate": -1.0},
        train={"batch_size": 15, "num_microbatches": 2},
        data={"source": ("nothing",)},
    )
    with pytest.raises(ConfigError) as raised:
        validate(config)
    named = ["model.num_heads", "model.dropout", "optimizer.learning_rate", "train.batch_size", "data.source"]
    assert len(raised.value.problems) == 5
    for key in named:
        assert sum(key in problem for problem in raised.value.problems) == 1, key
    assert str(raised.value).splitlines() == list(raised.value.problems)


def test_one_mistake_is_one_message() -> None:
    """What only follows from an impossible value is not told."""
    for key in ("model.num_heads", "model.width", "train.batch_size", "train.num_microbatches", "data.sequence_length"):
        assert len(problems_of(changed(key, 0))) == 1, key


@pytest.mark.parametrize(
    "changes",
    [
        {"model.width": -5},
        {"train.batch_size": -3, "train.num_microbatches": 2},
        {"train.num_microbatches": 0, "parallel.fsdp": 8},
        {"data.sequence_length": -2, "model.positions": "learned", "model.num_positions": -3},
        {"optimizer.decay_share": 2.0, "optimizer.schedule": "wsd"},
        {"train.num_steps": -1, "optimizer.warmup_steps": 5, "optimizer.schedule": "wsd"},
        {"parallel.fsdp": 0, "parallel.replica": 0},
    ],
    ids=str,
)
def test_what_follows_from_an_impossible_value_is_not_told_too(changes: dict[str, Any]) -> None:
    config = Config()
    for key, value in changes.items():
        config = changed(key, value, config)
    problems = problems_of(config)
    assert problems and all(": must " in problem for problem in problems), problems
    assert len({problem.partition(" =")[0] for problem in problems}) == len(problems)


def test_the_vocabulary_is_known_without_the_data_where_it_can_be() -> None:
    from transformer.data.tokenizers import ByteTokenizer

    assert known_vocab_size(DataConfig()) == DataConfig().tokenizer_vocab_size
    assert known_vocab_size(DataConfig(tokenizer="bytes")) == ByteTokenizer().vocab_size
    others = (DataConfig(tokenizer="characters"), DataConfig(tokenizer_path="x"), DataConfig(tokenizer="huggingface"))
    assert [known_vocab_size(data) for data in others] == [None] * 3


# Mesh.


@pytest.mark.parametrize(
    ("axes", "devices", "expected"),
    [
        ({}, 8, {"fsdp": 8}),
        ({"fsdp": 2, "tensor": -1}, 8, {"fsdp": 2, "tensor": 4}),
        ({"replica": 2, "fsdp": 2, "tensor": 2}, 8, {"replica": 2, "fsdp": 2, "tensor": 2}),
        ({"replica": -1, "fsdp": 1}, 4, {"replica": 4}),
    ],
)
def test_mesh_axes(axes: dict[str, int], devices: int, expected: dict[str, int]) -> None:
    config = replace(Config(), parallel=axes)
    assert mesh_problems(config, devices) == []
    sizes = mesh_axes(config, devices)
    assert list(sizes) == ["replica", "fsdp", "expert", "context", "tensor", "stage"]
    assert {name: size for name, size in sizes.items() if size > 1} == expected


@pytest.mark.parametrize(
    ("changes", "devices", "named"),
    [
        ({"parallel": {"fsdp": 2}}, 8, ["parallel.fsdp = 2", "does not match", "8 devices"]),
        ({"parallel": {"tensor": 3}}, 8, ["parallel.tensor = 3", "does not divide", "8 devices"]),
        ({"parallel": {"tensor": 2}}, 1, ["does not divide the 1 device at hand"]),
        ({"train": {"batch_size": 12}}, 8, ["train.batch_size", "12", "8 data-parallel devices"]),
        ({"train": {"num_microbatches": 4}}, 8, ["train.num_microbatches = 4", "8 data-parallel"]),
        ({"evaluation": {"batch_size": 12}}, 8, ["evaluation.batch_size = 12", "8 data-parallel"]),
    ],
)
def test_mesh_against_devices_and_batch(changes: dict[str, Any], devices: int, named: list[str]) -> None:
    config = replace(Config(), **changes)
    (problem,) = mesh_problems(config, devices)
    assert all(part in problem for part in named), problem
    with pytest.raises(ConfigError):
        validate(config, devices)


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


# Spelling.


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.widht", "model.width"),
        ("learning-rate", "optimizer.learning_rate"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("train.batchsize", "train.batch_size"),
        ("sede", "seed"),
    ],
)
def test_nearest(word: str, expected: str) -> None:
    assert nearest(word, keys()) == f" (did you mean {expected}?)"


@pytest.mark.parametrize("key", keys())
def test_a_misspelt_key_finds_itself(key: str) -> None:
    """Two letters in the middle of its name swapped, with its section, in underscores and in dashes."""
    section, dot, name = key.rpartition(".")
    middle = len(name) // 2
    swapped = name[: middle - 1] + name[middle] + name[middle - 1] + name[middle + 1 :]
    swapped = section + dot + (name[:-1] if swapped == name else swapped)
    assert nearest(swapped, keys()) == nearest(swapped.replace("_", "-"), keys()) == f" (did you mean {key}?)"


def test_mentioned_keys_are_whole_words() -> None:
    assert mentioned("model.width = 3, data.path.") == {"model.width", "data.path"}
    assert mentioned("xmodel.width model.widths model.width_x a.model.width model.width.x") == set()
    assert mentioned("--train.num-steps and the tokenizer_path") == set()


def test_nothing_near() -> None:
    assert nearest("xyzzy_q", keys()) == ""


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


# Patterns of layers.


def test_a_pattern_of_layers_is_read() -> None:
    assert parse_layers("attention") == (LayerKind("attention"),)
    assert parse_layers("2*attention.window/none + attention") == (
        *[LayerKind("attention", "window", "none")] * 2,
        LayerKind("attention"),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": "0*attention"}, "'0*attention' is not of the form"),
        ({"layers": "attention++attention"}, "'' is not of the form"),
        ({"layers": "atention"}, "'atention' is not a mixer"),
        ({"layers": "attention.windw"}, "'windw' is not a pattern, which are full, window, dilated, block_sparse (did"),
        ({"layers": "attention/dens"}, "'dens' is not a feed-forward kind, which are dense, experts, none (did"),
        ({"layers": "lstm.window"}, "only attention has keys that a pattern such as window leaves out, not lstm"),
        ({"layers": "3*attention"}, "is a period of 3 layers, which does not divide model.num_layers = 4"),
    ],
)
def test_a_wrong_pattern_of_layers_is_told(changes: dict[str, Any], expected: str) -> None:
    (problem,) = problems_of(replace(Config(), model=changes))
    assert problem.startswith(f"model.layers = {changes['layers']!r}") and expected in problem


PAIRS = {"architecture": "encoder_decoder"}
RULES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"positions": "relative", "num_relative_buckets": 2, "max_relative_distance": 2}, "causal", None),
    (
        {"positions": "relative", "num_relative_buckets": 1},
        "causal",
        "model.num_relative_buckets = 1: model.architecture = 'decoder' needs at least 2",
    ),
    (
        PAIRS | {"positions": "relative", "num_relative_buckets": 3},
        "span_corruption",
        "model.num_relative_buckets = 3: model.architecture = 'encoder_decoder' needs at least 4",
    ),
    (
        {"positions": "relative", "max_relative_distance": 16},
        "causal",
        "model.max_relative_distance = 16: must be more than 16, up to which distances have a bucket each "
        "(model.num_relative_buckets = 32)",
    ),
    ({"architecture": "encoder", "positions": "relative", "max_relative_distance": 9}, "masked_lm", None),
    (
        {"rotary_scaling": "dynamic_ntk", "rotary_original_length": 64},
        "causal",
        "model.rotary_scaling = 'dynamic_ntk' with data.sequence_length = 256 beyond 64 (model.rotary_original_length): "
        "texts in one row would be turned as the longest of them; train with another scaling",
    ),
    (
        {"layers": "attention.block_sparse", "num_window_blocks": 2},
        "causal",
        "model.num_window_blocks = 2: must be odd, a block and as many on either side",
    ),
    (
        {"cross_attention": "luong"},
        "causal",
        "model.cross_attention = 'luong': only model.architecture = 'encoder_decoder' reads an encoder, not 'decoder'",
    ),
    (
        PAIRS | {"cross_attention": "bahdanau", "layers": "mingru+attention"},
        "span_corruption",
        "model.cross_attention = 'bahdanau': it is part of the steps of lstm and gru, of which there is none in "
        "model.layers = 'mingru+attention'",
    ),
    (
        PAIRS | {"cross_attention": "luong", "parametrization": "mup"},
        "span_corruption",
        "model.parametrization = 'mup': it has no rules for recurrent networks and their attention; use 'standard'",
    ),
    (
        PAIRS | {"encoder_layers": "gru", "recurrent_width": 33},
        "span_corruption",
        "model.recurrent_width = 33: must be even, for half of an encoder's recurrent state goes each way",
    ),
    (
        {"architecture": "encoder", "layers": "lstm", "width": 33},
        "masked_lm",
        "model.width = 33: must be even, for half of an encoder's recurrent state goes each way",
    ),
    (
        {"layers": "attention+gru"},
        "prefix_lm",
        "model.layers = 'attention+gru': gru cannot see a prefix both ways, as objective.name = 'prefix_lm' asks",
    ),
    ({"layers": "lstm+gru/none", "width": 33}, "causal", None),  # without heads, their width is nothing to divide
    (PAIRS | {"cross_attention": "bahdanau", "layers": "gru", "num_heads": 7}, "span_corruption", None),
    (PAIRS | {"cross_attention": "luong", "layers": "mingru+attention"}, "span_corruption", None),
    (PAIRS | {"layers": "lstm", "encoder_layers": "attention"}, "span_corruption", None),
    (
        PAIRS | {"layers": "lstm", "num_heads": 7},
        "span_corruption",
        "model.width = 256 is not divisible by model.num_heads = 7: change one, or set model.head_width",
    ),
]


@pytest.mark.parametrize(("changes", "objective", "sentence"), RULES)
def test_what_recurrent_layers_cannot_do_is_told(changes: dict[str, Any], objective: str, sentence: str | None) -> None:
    problems = problems_of(replace(Config(), model=changes, objective={"name": objective}))
    assert problems == ([] if sentence is None else [sentence])

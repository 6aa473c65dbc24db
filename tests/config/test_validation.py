"""What is wrong with a configuration: every mistake at once, each in a sentence that names its keys."""

from typing import Any

import pytest
from changes import changed

from transformer.config import (
    Config,
    ConfigError,
    DataConfig,
    keys,
    known_vocab_size,
    mentioned,
    mesh_axes,
    mesh_problems,
    nearest,
    problems_of,
    replace,
    type_of,
    validate,
    validation,
)

# Validation. Each case is one mistake, and gives one message that names its keys.

POSITIVE = (
    "data.sequence_length data.tokenizer_vocab_size data.prefetch_batches model.num_layers model.width model.num_heads "
    "model.num_kv_heads model.head_width model.feedforward_width model.vocab_size model.num_positions "
    "model.norm_epsilon model.rotary_base model.initial_scale optimizer.learning_rate optimizer.epsilon "
    "train.num_steps train.batch_size train.num_microbatches train.max_nonfinite_steps train.log_every_steps "
    "evaluation.batch_size checkpoint.keep_latest model.chunk_length model.state_width model.convolution_width "
    "model.num_features parallel.rounds"
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
            "(parallel.replica x parallel.fsdp x parallel.expert)",
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
    from transformer.data.plain_tokenizers import ByteTokenizer

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
    assert list(sizes) == ["replica", "stage", "fsdp", "expert", "context", "tensor"]
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

"""Rules of a run's own, and what they and options do to layouts."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from transformer.config import MESH_AXES, Config, ConfigError, ParallelConfig, problems_of, replace
from transformer.models.parameters import parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.moments import place
from transformer.parallel.rules import left_whole
from transformer.parallel.sharding import RULES, constrain, make_mesh, partition_spec, rules_in_use, use_rules

SIZES = {"replica": 2, "fsdp": 2, "tensor": 2, "context": 2}


def table(**parallel: Any) -> dict[str, tuple[str, ...]]:
    with use_rules(replace(Config(), parallel=parallel)):
        return dict(rules_in_use.value)


def test_rules_change_the_table_for_as_long_as_they_are_in_use() -> None:
    rules = table(rules=("mlp=tensor, expert", "heads="))
    assert rules == {**RULES, "mlp": ("tensor", "expert"), "heads": ()}
    assert dict(rules_in_use.value) == RULES == table()
    with use_rules(replace(Config(), parallel={"rules": ("heads=",)})):
        assert partition_spec(("embed", "heads"), (8, 8), SIZES) == PartitionSpec("fsdp", None)
    assert partition_spec(("embed", "heads"), (8, 8), SIZES) == PartitionSpec("fsdp", "tensor")


def test_between_blocks_lengths_are_split_over_tensor_too() -> None:
    assert table(sequence_sharding=True) == {**RULES, "residual_length": ("context", "tensor")}
    assert table(sequence_sharding=True, rules=("residual_length=",))["residual_length"] == ()


def test_programs_of_other_rules_are_traced_anew(tiny_config: Any) -> None:
    config = tiny_config(parallel={"fsdp": 4, "tensor": 2})
    x = jnp.ones((8, 4, 6))
    named = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))
    with jax.set_mesh(make_mesh(config)):
        assert named(x).sharding.spec == PartitionSpec("fsdp", None, "tensor")
        with use_rules(replace(config, parallel={"rules": ("mlp=",)})):
            assert named(x).sharding.spec == PartitionSpec("fsdp")


def test_all_mistakes_in_rules_are_told_at_once() -> None:
    rules = ("mpl=tensor", "heads", "vocab=tnsor", "batch=fsdp", "embed=fsdp", "embed=", "state=fsdp,fsdp")
    with pytest.raises(ConfigError) as caught:
        table(rules=rules)
    starts = [
        "parallel.rules: 'mpl=tensor': 'mpl' is none of batch, ",
        "parallel.rules: 'heads' is not of the form NAME=AXIS,AXIS",
        "parallel.rules: 'vocab=tnsor': 'tnsor' is none of the axes replica, ",
        "parallel.rules: 'batch=fsdp': the batch lies over replica, fsdp and expert",
        "parallel.rules: 'embed=': 'embed' has a rule already",
        "parallel.rules: 'state=fsdp,fsdp': an axis splits a dimension once",
    ]
    assert len(caught.value.problems) == len(starts)
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(start)
    told = list(caught.value.problems)
    assert "did you mean mlp?" in told[0] and "did you mean tensor?" in told[2]


def test_two_dimensions_of_an_array_on_one_axis_are_an_error_with_names() -> None:
    with (
        use_rules(replace(Config(), parallel={"rules": ("embed=tensor",)})),
        pytest.raises(ValueError, match=r"'embed' and 'mlp' .* 'tensor'"),
    ):
        partition_spec(("embed", "mlp"), (8, 8), SIZES)


def test_what_is_left_whole_is_told(tiny_config: Any) -> None:
    config = tiny_config(model={"width": 36, "num_heads": 6, "num_kv_heads": 2, "feedforward_width": 24})
    sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": 8, "tensor": 3}
    told = left_whole(config.model, parameter_specs(Transformer(config.model)), sizes)
    assert told["embedding, vocab"] == "256 is not divisible by tensor 3"
    assert told["decoder/layers/mixer/query/kernel, embed"] == "36 is not divisible by fsdp 8"
    assert told["heads of keys and values, in activations"] == "2 is not divisible by tensor 3"
    assert "decoder/layers/mixer/query/kernel, heads" not in told
    assert left_whole(config.model, parameter_specs(Transformer(config.model)), dict.fromkeys(MESH_AXES, 1)) == {}


# The optimizer's moments.


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ((None, "fsdp", "tensor"), (2, 64, 48), (None, ("fsdp", "replica"), "tensor")),
        ((None, "fsdp"), (3, 10), (None, "fsdp")),
        (("fsdp",), (8,), (("fsdp", "replica"),)),
        ((), (4, 6), ("replica", None)),
        ((None,), (5,), (None,)),
    ],
)
def test_moments_are_split_over_replicas_where_they_divide(spec: Any, shape: Any, expected: Any) -> None:
    """In the largest piece of a dimension, behind what splits it already."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {"replica": 4, "fsdp": 2, "tensor": 2}
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    layout = NamedSharding(mesh, PartitionSpec(*spec))
    placed = place(ParallelConfig(shard_optimizer=True), layout, shape)
    assert placed.spec == PartitionSpec(*expected) and placed.memory_kind == layout.memory_kind
    hosted = place(ParallelConfig(shard_optimizer=True, offload_optimizer=True), layout, shape)
    assert hosted.spec == placed.spec and hosted.memory_kind == "pinned_host"


def test_an_average_is_not_split() -> None:
    for optimizer in ({"ema_decay": 0.9}, {"name": "schedule_free", "schedule": "constant"}):
        config = replace(Config(), parallel={"shard_optimizer": True}, optimizer=optimizer)
        (problem,) = problems_of(config)
        assert problem.startswith("parallel.shard_optimizer = True: ")

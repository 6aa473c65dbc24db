"""The mesh, the table of rules, and the way of a batch onto the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from transformer.config import MESH_AXES, ConfigError
from transformer.models.parameters import is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.parallel.sharding import (
    RULES,
    batch_sharding,
    constrain,
    global_array,
    local_rows,
    make_mesh,
    partition_spec,
    sharding,
)

SIZES = {"replica": 2, "fsdp": 2, "tensor": 2}


def test_names_become_mesh_axes():
    assert partition_spec(("vocab", "embed"), (256, 32), SIZES) == PartitionSpec("tensor", "fsdp")
    assert partition_spec(("layers", "norm"), (3, 32), SIZES) == PartitionSpec(None, None)
    assert partition_spec(("batch", "length", "heads"), (8, 16, 4), SIZES) == PartitionSpec(
        ("replica", "fsdp"), None, "tensor"
    )


def test_axes_of_size_one_are_left_out():
    assert partition_spec(("batch", "mlp"), (8, 6), {"replica": 1, "fsdp": 4}) == PartitionSpec("fsdp", None)


def test_what_does_not_divide_stays_whole():
    assert partition_spec(("heads", "embed"), (6, 33), {"tensor": 4, "fsdp": 2}) == PartitionSpec(None, None)
    # Of two axes the first may still fit.
    assert partition_spec(("batch",), (6,), SIZES) == PartitionSpec("replica")
    assert partition_spec(("batch",), (3,), SIZES) == PartitionSpec(None)


def test_an_unknown_name_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'emdeb'.*vocab.*embed.*kv_heads"):
        partition_spec(("emdeb",), (4,), SIZES)


@pytest.mark.parametrize("sizes", [SIZES, {"tensor": 8}, {}], ids=["used", "alone", "unused"])
def test_two_names_on_one_mesh_axis_are_an_error_whatever_the_mesh(sizes):
    with pytest.raises(ValueError, match=r"'heads' and 'mlp' .* 'tensor'"):
        partition_spec(("heads", "mlp"), (5, 7), sizes)
    with pytest.raises(ValueError, match=r"'batch' and 'embed' .* 'fsdp'"):
        partition_spec(("batch", "embed"), (8, 8), sizes)


def test_another_table_of_rules():
    rules = {"embed": ("tensor", "fsdp")}
    assert partition_spec(("embed",), (8,), SIZES, rules) == PartitionSpec(("tensor", "fsdp"))
    with pytest.raises(ValueError, match="'vocab'"):
        partition_spec(("vocab",), (8,), SIZES, rules)


def test_rules_name_axes_of_the_mesh():
    assert {axis for axes in RULES.values() for axis in axes} <= set(MESH_AXES)


def test_every_large_parameter_is_split_over_all_devices_of_a_copy(tiny_config):
    model = {"positions": "learned", "activation": "swiglu", "tied_embeddings": False, "biases": True}
    config = tiny_config(model=model, parallel={"fsdp": 2, "tensor": 4})
    mesh = make_mesh(config)
    for spec in jax.tree.leaves(parameter_specs(Transformer(config.model)), is_leaf=is_spec):
        layout = sharding(mesh, spec.axes, spec.shape)
        pieces = int(np.prod(spec.shape) / np.prod(layout.shard_shape(spec.shape)))
        if "positions" in spec.axes:
            assert pieces == 2
        elif spec.role in ("matrix", "embedding"):
            assert pieces == 8, spec


def test_mesh_takes_what_is_left(tiny_config):
    mesh = make_mesh(tiny_config(parallel={"fsdp": -1, "tensor": 2}))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {axis: 1 for axis in MESH_AXES} | {"fsdp": 4, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()


@pytest.mark.parametrize(
    ("parallel", "train", "words"),
    [
        ({"fsdp": 3}, {"batch_size": 6}, ["parallel.fsdp = 3", "8 devices"]),
        ({"fsdp": -1, "tensor": 3}, {}, ["parallel.tensor = 3", "does not divide"]),
        ({"fsdp": 8}, {"batch_size": 12}, ["train.batch_size", "12", "8 data-parallel"]),
        ({"fsdp": 8}, {"num_microbatches": 2}, ["train.num_microbatches", "= 4", "8 data-parallel"]),
    ],
)
def test_meshes_that_do_not_fit_are_named(parallel, train, words, tiny_config):
    with pytest.raises(ConfigError) as caught:
        make_mesh(tiny_config(parallel=parallel, train=train))
    assert all(word in str(caught.value) for word in words)


@pytest.fixture
def mesh(tiny_config):
    return make_mesh(tiny_config(parallel={"replica": 2, "fsdp": 2, "tensor": 2}))


def test_constraint_holds_under_a_mesh_and_is_nothing_without(mesh):
    x = jnp.ones((8, 4, 6))

    def named(x):
        return constrain(x, "batch", "length", "mlp") * 2

    assert constrain(x, "batch", "length", "mlp") is x
    with jax.set_mesh(mesh):
        laid = jax.jit(named)(x)
    assert laid.sharding.spec == PartitionSpec(("replica", "fsdp"), None, "tensor")
    np.testing.assert_array_equal(laid, 2 * x)


def test_batches_lie_by_rows_over_the_data_parallel_axes(mesh):
    rows = local_rows(mesh, 8)
    assert rows == list(range(8))
    local = {"inputs": np.arange(48, dtype=np.int32).reshape(8, 6), "weights": np.ones((8, 6), np.float32)}
    batch = global_array(mesh, rows, 8, local)
    assert set(batch) == set(local)
    for name, values in batch.items():
        assert values.sharding == batch_sharding(mesh) and values.dtype == local[name].dtype
        np.testing.assert_array_equal(values, local[name])
        assert {shard.data.shape for shard in values.addressable_shards} == {(2, 6)}


def test_a_batch_passes_the_transfer_guard_of_the_loop(mesh):
    with jax.transfer_guard("disallow"):
        batch = global_array(mesh, range(8), 8, {"inputs": np.zeros((8, 2), np.int32)})
    assert batch["inputs"].shape == (8, 2)

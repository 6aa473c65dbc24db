"""A pipeline computes what one device does with the same microbatches, and the stages do what the table says."""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from transformer.models.parameters import init_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.schedules import IDLE, schedule
from transformer.parallel.sharding import batch_sharding, make_mesh
from transformer.training.pipeline import Pipeline
from transformer.training.state import state_shardings
from transformer.training.step import make_gradient

SMALL = {"width": 16, "num_heads": 2, "scan_layers": True, "biases": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        "model": SMALL | {"num_layers": 4, "width": 64, "remat": "full"},
        "objective": {"z_loss": 1e-3},
        "train": {"num_microbatches": 16, "batch_size": 32},
    },
    # Relative positions have parameters that all layers share, and dropout keys of their own everywhere.
    "deep": {
        "model": SMALL | {"num_layers": 8, "positions": "relative", "dropout": 0.2},
        "train": {"num_microbatches": 4, "batch_size": 8},
    },
    "experts": {
        "model": SMALL
        | {
            "scan_layers": False,
            "layers": "attention/experts",
            "num_layers": 2,
            "num_experts": 4,
            "router_z_loss": 0.01,
            "balance_bias_rate": 0.1,
        },
        "train": {"num_microbatches": 2, "batch_size": 8},
    },
    "encoder_decoder": {
        "model": SMALL | {"architecture": "encoder_decoder", "num_encoder_layers": 2, "num_layers": 2},
        "objective": {"name": "span_corruption"},
        "train": {"num_microbatches": 4, "batch_size": 8},
    },
    # Experts in both stacks, dropout, and positions with parameters.
    "pair": {
        "model": SMALL
        | {
            "architecture": "encoder_decoder",
            "layers": "attention/experts",
            "num_experts": 4,
            "num_encoder_layers": 2,
            "num_layers": 4,
            "positions": "relative",
            "dropout": 0.1,
        },
        "objective": {"name": "span_corruption"},
        "train": {"num_microbatches": 4, "batch_size": 16},
    },
    "encoder": {
        "model": SMALL | {"architecture": "encoder", "positions": "learned", "num_layers": 4, "norm_placement": "post"},
        "objective": {"name": "masked_lm"},
        "train": {"num_microbatches": 4, "batch_size": 16},
    },
    "future": {
        "model": SMALL | {"layers": "attention/experts", "num_experts": 4, "num_layers": 4, "num_future_tokens": 1},
        "objective": {"name": "multi_token"},
        "train": {"num_microbatches": 4, "batch_size": 16},
    },
}


@pytest.fixture(scope="module")
def prepare(tiny_config, tiny_batch):
    """Returns configuration, model, and on their mesh: the layout of the parameters, their first values, a batch, a key."""

    def prepare(model: str, parallel: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
        config = tiny_config(**MODELS[model], parallel=dict(parallel))
        size = int(np.prod([getattr(config.parallel, axis) for axis in ("replica", "stage", "fsdp", "tensor")]))
        mesh = make_mesh(config, jax.devices()[:size])
        network = Transformer(config.model)
        layout = state_shardings(network, make_optimizer(config, parameter_specs(network)), mesh).params
        params = init_parameters(network, jax.random.key(0, impl="unsafe_rbg"))
        batch = tiny_batch(config)
        # Of the microbatches one has a hundredth of the weight that its tokens had, and one three times as much.
        batch["weights"] *= np.resize(np.array([0.01, 3, 1], np.float32), len(batch["weights"]))[:, None]
        if config.model.architecture == "encoder_decoder":
            names = ("inputs", "positions", "segment_ids")
            batch |= {f"encoder_{name}": tiny_batch(config, 1)[name] for name in names}
        key = jax.random.key(3) if config.model.dropout else None
        placed = jax.device_put(params, layout), jax.device_put(batch, batch_sharding(mesh)), key
        return config, network, mesh, layout, placed

    return prepare


@pytest.fixture(scope="module")
def run(prepare):
    """Returns gradient, metrics, log of a pipeline and compiled program; of one device the first two."""

    @functools.cache
    def run(model: str, **parallel: Any) -> tuple[Any, ...]:
        config, network, mesh, layout, placed = prepare(model, tuple(parallel.items()))
        options = {"xla_backend_optimization_level": 0}
        with jax.set_mesh(mesh):
            if config.parallel.stage == 1:
                return jax.device_get(jax.jit(make_gradient(config, network), compiler_options=options)(*placed))
            pipeline = Pipeline(config, network)

            def gradient(params: Any, batch: Any, key: Any) -> Any:
                gradients, (loss, means, statistics), log = pipeline(params, batch, key, pipeline.parts)
                found = {name: value / weight for name, (value, weight) in statistics.items()}
                return gradients, {"loss": loss} | means | found, log

            jitted = jax.jit(gradient, out_shardings=(layout, None, None), compiler_options=options)
            compiled = jitted.lower(*placed).compile()
            return *jax.device_get(compiled(*placed)), compiled

    return run


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    gradients, metrics, *_ = found
    one_device, wanted = expected
    assert set(metrics) == set(wanted) - {"tokens"}
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-9, err_msg=name)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(one_device), strict=True
    ):
        norm = np.linalg.norm(other)
        assert norm > 0 and np.linalg.norm(one - other) <= 1e-5 * norm, jax.tree_util.keystr(path)


def assert_followed(log: Any, kind: Any, stages: int, parts: int, rounds: int = 1) -> None:
    """Compares what passed through the stages, told by labels that travelled with it, with the table."""
    table = schedule(kind, stages, parts, rounds)
    forward = np.stack([table.forward, table.forward_round * stages + np.arange(stages)], axis=-1)
    backward = np.stack([table.backward, table.backward_round * stages + np.arange(stages)], axis=-1)
    went, came = table.forward != IDLE, table.backward != IDLE
    assert log.shape == (*table.forward.shape, 6)
    np.testing.assert_array_equal(log[went][:, :2], forward[went])
    np.testing.assert_array_equal(log[came][:, 2:4], backward[came])
    # A gradient is that of what a group has made: it has passed one group more than what came into it.
    np.testing.assert_array_equal(log[came][:, 4:], backward[came] + [0, 1])
    # Where no stage has anything to do, none computes: so the program rests as long as the formula says, and no longer.
    computed = [np.any(half != IDLE, axis=(1, 2)) for half in (log[..., :2], log[..., 2:])]
    np.testing.assert_array_equal(computed[0], np.any(went, axis=1))
    np.testing.assert_array_equal(computed[1], np.any(came, axis=1))
    time = computed[0].sum() + 2 * computed[1].sum()
    assert 1 - 3 * parts * rounds / time == pytest.approx((stages - 1) / (parts * rounds + stages - 1))


def test_1f1b_and_gpipe_compute_what_one_device_does_and_the_first_keeps_less(run):
    alone = run("dense", stage=1)
    *one, log, compiled = run("dense", stage=2, schedule="1f1b")
    assert_equal(tuple(one), alone)
    assert_followed(log, "1f1b", 2, 16)
    *other, log, keeps_all = run("dense", stage=2, schedule="gpipe")
    assert_equal(tuple(other), alone)
    assert_followed(log, "gpipe", 2, 16)
    less, more = (program.memory_analysis().temp_size_in_bytes for program in (compiled, keeps_all))
    # Sixteen inputs of a stage against three, each of 2 x 16 tokens of 64 numbers; the program itself differs a little too.
    assert more - less > 0.6 * (16 - 3) * (2 * 16 * 64 * 4)


@pytest.mark.slow
def test_interleaved_groups_on_four_stages_with_fsdp(run):
    found = run("deep", stage=4, fsdp=2, schedule="interleaved", rounds=2)
    assert_equal(found, run("deep", stage=1))
    assert_followed(found[2], "interleaved", 4, 4, 2)
    for leaf in jax.tree.leaves(found[0]["decoder"]["layers"]):
        assert leaf.shape[0] == 8


@pytest.mark.slow
def test_experts_with_all_other_axes_inside_a_stage(run, capfd):
    assert_equal(run("experts", stage=2, fsdp=2, tensor=2, schedule="1f1b"), run("experts", stage=1))
    assert "rematerialization" not in capfd.readouterr().err, "the compiler replicates an activation"


@pytest.mark.slow
def test_both_stacks_of_an_encoder_decoder(run):
    assert_equal(run("encoder_decoder", stage=2, schedule="gpipe"), run("encoder_decoder", stage=1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "parallel"),
    [
        ("dense", {"stage": 4, "schedule": "1f1b"}),
        ("dense", {"stage": 4, "schedule": "gpipe", "tensor": 2}),
        ("dense", {"stage": 2, "fsdp": 2, "tensor": 2, "schedule": "interleaved", "rounds": 2}),
        ("dense", {"stage": 2, "replica": 2, "tensor": 2, "schedule": "gpipe"}),
        ("deep", {"stage": 4, "tensor": 2, "schedule": "1f1b"}),
        ("experts", {"stage": 2, "replica": 2, "schedule": "gpipe"}),
        ("pair", {"stage": 2, "fsdp": 2, "tensor": 2, "schedule": "interleaved", "rounds": 2}),
        ("pair", {"stage": 2, "fsdp": 2, "schedule": "1f1b"}),
        ("encoder", {"stage": 4, "replica": 2, "schedule": "1f1b"}),
        ("future", {"stage": 2, "tensor": 2, "schedule": "1f1b"}),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{axis} {size}" for axis, size in value.items()),
)
def test_every_schedule_with_other_axes(model, parallel, run):
    assert_equal(run(model, **parallel), run(model, stage=1))

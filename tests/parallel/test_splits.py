"""Every split of eight simulated devices computes what one device does.

Two programs a split: ten steps of AdamW, whose losses are compared, and ten of plain SGD, whose first gradient and last
parameters are (Adam turns rounding noise in gradients of zero into whole steps). Equal means ||a - b|| <= 1e-5 ||b||.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
import optax
import pytest

from transformer.config import MESH_AXES, Config, replace
from transformer.models.parameters import init_parameters, is_spec, parameter_specs
from transformer.models.transformer import Transformer
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import batch_sharding, make_mesh, replicated, use_rules
from transformer.training.state import TrainState, state_shardings
from transformer.training.step import make_train_step

NUM_STEPS = 10

LANDED = {"replica", "fsdp", "expert", "tensor"}
"""Axes that can be split; rows of others wait for them."""

DENSE = {
    "vocab_size": 61,
    "num_layers": 4,
    "width": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "feedforward_width": 32,
    "norm": "rmsnorm",
    "activation": "swiglu",
    "tied_embeddings": False,
    "scan_layers": True,
}
EXPERTS = DENSE | {"layers": "attention/experts", "num_experts": 4, "expert_width": 16, "balance_loss": 0.05}
PAIRS = DENSE | {"architecture": "encoder_decoder", "num_kv_heads": 4, "num_layers": 2, "num_encoder_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"model": DENSE, "objective": {"z_loss": 1e-3}},
    "experts": {"model": EXPERTS | {"balance_bias_rate": 0.01, "num_shared_experts": 1}},
    "capacity": {"model": EXPERTS | {"expert_capacity_factor": 0.8}},
    "pairs": {
        "model": PAIRS,
        "objective": {"name": "seq2seq"},
        "data": {"source_path": ("read",), "target_path": ("write",)},
    },
}

OPTIMIZERS = {
    "adamw": {"learning_rate": 3e-3, "warmup_steps": 5},
    # So small a momentum changes no bit of the parameters, and leaves the gradient of the first step in the state.
    "sgd": {"name": "sgd", "learning_rate": 0.3, "clip_norm": 0.0, "momentum": 1e-30, "schedule": "constant"},
}


def config_of(model: str, optimizer: str, split: str = "") -> Config:
    """Returns the configuration of a row of the table."""
    words = [word.partition("=") for word in split.split()]
    parallel: dict[str, Any] = dict.fromkeys(MESH_AXES, 1) | {name: int(size or 1) for name, _, size in words}
    base = replace(
        Config(),
        data={"sequence_length": 16, "tokenizer_vocab_size": 61},
        train={"batch_size": 8, "num_steps": 10},
        parallel={"fsdp": 1},
    )
    return replace(base, **MODELS[model], optimizer=OPTIMIZERS[optimizer], parallel=parallel)


def batch_of(config: Config, make: Any, seed: int) -> dict[str, np.ndarray]:
    batch = make(config, seed)
    if config.model.architecture == "encoder_decoder":
        read = make(config, seed + 1000)
        # What is read is packed beside what is written: each text has at least one token of either.
        names = ("inputs", "positions", "segment_ids")
        batch |= {f"encoder_{name}": read[name] for name in names}
    return batch


def train(config: Config, batches: list[Any]) -> dict[str, Any]:
    """Returns the losses of all steps, compiled and laid out as in the loop, and the state after the first and the last."""
    mesh = make_mesh(config, jax.devices()[: math.prod(getattr(config.parallel, axis) for axis in MESH_AXES)])
    model = Transformer(config.model)
    optimizer = make_optimizer(config, parameter_specs(model))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh), use_rules(config):
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
        step = jax.jit(
            make_train_step(config, model, optimizer, shardings),
            in_shardings=(shardings, dict.fromkeys(batches[0], rows)),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
            compiler_options={"xla_backend_optimization_level": 0},  # LLVM's, which take most of the time
        )
        # The default generator takes the compiler seconds; `create_state` has a test of its own.
        params = init_parameters(model, jax.random.key(0, impl="unsafe_rbg"))
        zero = np.zeros((), np.int32)
        state = jax.device_put(TrainState(zero, params, optimizer.init(params), zero), shardings)
        losses, first = [], None
        for batch in batches:
            state, metrics = step(state, jax.device_put(batch, rows))
            losses.append(metrics["loss"].item())
            first = first or jax.device_get(state)
    return {"losses": losses, "first": first, "last": state}

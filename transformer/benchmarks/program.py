"""The training step of a configuration, compiled and ready to be called, on a batch that is made up."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from transformer.checkpointing.run import for_platform, resolve
from transformer.config import Config, data_kind, source_length, validate
from transformer.config.tasks import NUM_OUTPUTS
from transformer.models import flops
from transformer.models.parameters import num_parameters, parameter_specs
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of, vocabulary, with_window
from transformer.optimizers import make_optimizer
from transformer.parallel.sharding import batch_sharding, make_mesh, use_rules
from transformer.training.state import TrainState, abstract_state, create_state, state_shardings
from transformer.training.step import compile_step, make_train_step

FEWEST_LABELS = 2
"""Where only the data tells how many there are."""


@dataclass
class Program:
    """A step that can be called again and again; its state is donated to each call, and kept here."""

    config: Config
    model: Transformer
    mesh: Mesh
    compiled: Any
    compile_seconds: float
    batch: dict[str, jax.Array]
    state: TrainState | None = None

    def __call__(self) -> dict[str, jax.Array]:
        """Takes one step and returns its metrics."""
        self.start()
        with jax.set_mesh(self.mesh), use_rules(self.config):
            self.state, metrics = self.compiled(self.state, self.batch)
        return metrics

    def start(self) -> None:
        """Makes the first state, if there is none: what has to be done before a step is timed."""
        if self.state is None:
            with jax.set_mesh(self.mesh), use_rules(self.config):
                self.state = jax.block_until_ready(create_state(self.config, self.model, *self._optimizer()))

    def _optimizer(self) -> tuple[Any, TrainState]:
        optimizer = make_optimizer(self.config, parameter_specs(self.model))
        return optimizer, state_shardings(self.model, optimizer, self.mesh, self.config.parallel)

    @property
    def num_tokens(self) -> int:
        """Places of a step, of an encoder-decoder those of the decoder."""
        return self.config.train.batch_size * self.config.data.sequence_length

    @property
    def num_parameters(self) -> int:
        return num_parameters(self.model)

    def flops(self, causal: bool) -> float:
        """Returns the model FLOPs of a step, with attention in full or its causal half."""
        config = self.config
        length = config.data.sequence_length
        return self.num_tokens * flops.training_flops_per_token(config.model, length, causal, source_length(config))

    @property
    def peak_flops(self) -> float | None:
        """The FLOP/s that the devices can reach, None where that is not known."""
        return flops.peak_flops(self.mesh.devices.flat[0].device_kind, self.mesh.size)

    @property
    def recomputed_flops(self) -> float:
        return recomputed_flops(self.config)

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each device, by XLA's own account: state and batch, temporaries, and the most at one time."""
        found: Any = self.compiled.memory_analysis()
        arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
        outputs = found.output_size_in_bytes - found.alias_size_in_bytes
        return {"arguments": arguments, "temporaries": temporary, "peak": arguments + temporary + outputs}


def recomputed_flops(config: Config) -> float:
    """Returns the FLOPs of a step that rematerialisation adds to the model's own: all of the forward pass, or its attention;
    and the logits, where they are computed in chunks."""
    length = config.data.sequence_length
    parts = flops.forward_flops(config.model, length, source_length(config))
    parts.pop("attention_scores")
    layers = {name: count for name, count in parts.items() if name != "logits"}
    named = {"attention_projections": {"heads", "mixer_output"}, "feedforward": {"feedforward_hidden"}}
    kept = set() if config.model.remat == "full" else named.keys()
    if config.model.remat in ("names", "offload"):
        kept = {part for part, names in named.items() if names <= set(config.model.remat_names)}
    again = () if config.model.remat == "none" else tuple(name for name in layers if name not in kept)
    logits = parts["logits"] if 0 < config.objective.logit_chunk < length else 0
    return float(config.train.batch_size * (logits + sum(layers[name] for name in again)))


def fewest_labels(config: Config) -> int:
    """Returns the labels of a task whose data is not there to tell them; 0 where there are none, or they are given."""
    if data_kind(config) != "labelled" or config.model.num_labels:
        return 0
    return NUM_OUTPUTS.get(config.objective.name, FEWEST_LABELS)


def make_program(config: Config) -> Program:
    """Compiles the step that `train` would run; raises ConfigError for a configuration that it would refuse."""
    mesh = make_mesh(validate(config))
    size = vocabulary.without_data(config)
    labels = fewest_labels(config)
    config = resolve(with_window(config), size, labels)
    model = Transformer(for_platform(config.model, jax.default_backend()))
    optimizer = make_optimizer(config, parameter_specs(model))
    rows = batch_sharding(mesh)
    with jax.set_mesh(mesh), use_rules(config):
        shardings = state_shardings(model, optimizer, mesh, config.parallel)
        batch = {name: jax.device_put(array, rows) for name, array in made_up(config).items()}
        step = make_train_step(config, model, optimizer, shardings)
        start = time.perf_counter()
        compiled = compile_step(step, abstract_state(model, optimizer, shardings), batch, shardings, mesh)
        seconds = time.perf_counter() - start
    return Program(config, model, mesh, compiled, seconds, batch)


def made_up(config: Config) -> Mapping[str, np.ndarray]:
    """Returns a batch of the objective's arrays without padding: one text a row, of tokens and targets drawn evenly."""
    model, rng = config.model, np.random.default_rng(0)
    assert model.vocab_size is not None, "resolved"

    def values(name: str, length: int, dtype: str) -> np.ndarray:
        shape = (config.train.batch_size, length)
        if name.endswith("positions"):
            return np.broadcast_to(np.arange(length, dtype=dtype), shape)
        if name.endswith(("segment_ids", "weights")):
            return np.ones(shape, dtype)
        if dtype == "bool":
            return np.zeros(shape, dtype)
        largest = model.num_labels if name == "targets" and model.num_labels else model.vocab_size
        return rng.integers(0, largest, shape).astype(dtype)

    arrays = objective_of(config).arrays(config)
    return {name: values(name, length, dtype) for name, (length, dtype) in arrays.items()}

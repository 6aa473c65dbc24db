"""Recurrent networks as layers: LSTM, GRU and minGRU, both ways in an encoder; a decoder's may read the encoder."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer.config import LayerKind, ModelConfig
from transformer.models.cache import Cache, CacheSpec, keep_memory, read, write
from transformer.models.elementwise_recurrence import min_gru
from transformer.models.layers import Linear
from transformer.models.mixers import Context
from transformer.models.parameters import Initializer, normal, parameter
from transformer.models.recurrence import CELLS, Reader, State, Steps, recurrence
from transformer.models.spans import spans_in, spans_of
from transformer.parallel.sharding import constrain

STATES = {name: cell.states for name, cell in CELLS.items()} | {"mingru": ("hidden",)}
"""The arrays of each network's state."""


def orthogonal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns square orthogonal matrices side by side, one for each gate (Saxe et al. 2014, arXiv:1312.6120)."""
    width, total = shape
    make = jax.nn.initializers.orthogonal()
    # One at a time, however many layers are drawn: on a CPU a thread of XLA's pool that factorises a batch waits for the others
    # of that pool, and when all of them do so no step is ever taken.
    one = jax.custom_batching.sequential_vmap(lambda block_key: make(block_key, (width, width), jnp.float32))
    blocks = jax.lax.map(one, jax.random.split(key, total // width))
    return blocks.swapaxes(0, 1).reshape(shape)


def ones_in(block: int | None, width: int) -> Initializer:
    """Returns an initialiser of biases: 1 in one block of `width` (Gers et al. 2000), elsewhere 0."""
    number = -1 if block is None else block
    return lambda key, shape: (jnp.arange(shape[0]) // width == number).astype(jnp.float32)


class Direction(nnx.Module):
    """The weights of one pass over the text."""

    def __init__(self, config: ModelConfig, mixer: str, width: int):
        cell = CELLS.get(mixer)
        inputs = (2 if cell is None else cell.num_inputs) * width
        # Nothing adds up what a state is made of, unlike a residual stream: maps keep the scale of what they are given.
        self.input = Linear(config, (config.width, inputs), ("embed", "state"), config.width**-0.5, bias=False)
        init = ones_in(None if cell is None else cell.keeping_gate, width)
        self.bias = parameter((inputs,), ("state",), init, "bias")
        products = (width, 0 if cell is None else cell.num_products * width)
        self.recurrent = parameter(products, ("embed", "state"), orthogonal, "matrix") if products[1] else None


class Reading(nnx.Module):
    """The weights with which a state reads the encoder's output."""

    def __init__(self, config: ModelConfig, mixer: str):
        width, state = config.width, config.recurrent_dim
        self.query = parameter((state, state), ("embed", "state"), normal(state**-0.5), "matrix")
        self.key = Linear(config, (width, state), ("embed", "state"), width**-0.5, bias=True)
        self.score = parameter((state,), ("state",), normal(state**-0.5), "bias")
        inputs = CELLS[mixer].num_inputs * state
        self.context = parameter((width, inputs), ("embed", "state"), normal(width**-0.5), "matrix")


class Recurrent(nnx.Module):
    """A recurrent network over each segment.

    What sees the whole text has two, one a direction, each with half the state's width (Schuster & Paliwal 1997). With
    `reads_memory`, each step reads the encoder by additive attention before it (Bahdanau et al. 2015,
    arXiv:1409.0473), and the output is made of the state and of what was read, as in their appendix A.2.2. States begin
    at zero, also where the paper begins with the encoder's last.
    """

    def __init__(self, config: ModelConfig, kind: LayerKind, num_layers: int, causal: bool, reads_memory: bool):
        self.config, self.mixer, state = config, kind.mixer, config.recurrent_dim
        self.state_width = state if causal else state // 2
        self.forward = Direction(config, kind.mixer, self.state_width)
        self.backward = None if causal else Direction(config, kind.mixer, self.state_width)
        self.reading = Reading(config, kind.mixer) if reads_memory else None
        rows = state + config.width if reads_memory else state
        is_mapped = rows != config.width
        self.output = Linear(config, (rows, config.width), ("state", "embed"), rows**-0.5) if is_mapped else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: Cache | None, layer: Int[Array, ""] | int
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        segments = context.tokens.segment_ids.T
        inputs = constrain(x.swapaxes(0, 1), "length", "batch", "hidden")
        names = STATES[self.mixer]
        if cache is None:
            state = tuple(jnp.zeros((x.shape[0], self.state_width), jnp.float32) for _ in names)
        else:
            state = tuple(read(cache[name], layer) for name in names)
        reader, source = None, None
        if self.reading is not None:
            assert context.memory is not None
            reader, cache = self._reader(self.reading, context, cache, layer)
            source = context.memory.tokens.segment_ids
        steps = Steps(spans_in(context).starts.T, segments)
        last, hidden, found = self._run(self.forward, False, inputs, state, steps, reader, source)
        parts = [hidden] if found is None else [hidden, found]
        if cache is not None:
            cache = cache | {name: write(cache[name], layer, new) for name, new in zip(names, last, strict=True)}
        if self.backward is not None:
            steps = Steps(spans_of(segments[::-1].T).starts.T[::-1], segments)
            parts.append(self._run(self.backward, True, inputs, state, steps, None, None)[1])
        output = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else hidden
        output = jnp.where(segments[:, :, None] != 0, output, 0).astype(x.dtype).swapaxes(0, 1)
        output = constrain(output, "batch", "length", "hidden")
        return output if self.output is None else self.output(output), cache

    def _run(
        self,
        weights: Direction,
        backwards: bool,
        x: Float[Array, "T B D"],
        state: State,
        steps: Steps,
        reader: Reader | None,
        source_segments: Int[Array, "B S"] | None,
    ) -> tuple[State, Float[Array, "T B W"], Float[Array, "T B D"] | None]:
        """Returns the last state, all hidden states, and what was read of the encoder's output."""
        inputs = weights.input(x) + weights.bias[...].astype(x.dtype)
        if weights.recurrent is None:
            hidden = min_gru(backwards, inputs, state[0], steps)
            return (hidden[0 if backwards else -1],), hidden, None
        # Gathered once, before the loop.
        recurrent = constrain(weights.recurrent[...].astype(x.dtype), "hidden", "state")
        return recurrence(CELLS[self.mixer], backwards, recurrent, inputs, state, steps, reader, source_segments)

    def _reader(
        self, weights: Reading, context: Context, cache: Cache | None, layer: Any
    ) -> tuple[Reader, Cache | None]:
        """Returns what the loop reads, and the cache with what of it is the same in every step."""
        memory = context.memory
        assert memory is not None
        made = None if memory.hidden is None else (weights.key(memory.hidden), memory.hidden)
        cache, (keys, values) = keep_memory(cache, layer, made)
        query, into = (
            constrain(weight[...].astype(keys.dtype), "hidden", "state") for weight in (weights.query, weights.context)
        )
        return Reader(query, weights.score[...].astype(keys.dtype), into, keys, values), cache

    def cache_specs(self, batch_size: int, length: int, source_length: int = 0) -> dict[str, CacheSpec]:
        """Returns the state, and what is kept of the `source_length` columns that the encoder read, if this reads them."""
        config = self.config
        specs = {name: CacheSpec((batch_size, self.state_width), ("batch", "state")) for name in STATES[self.mixer]}
        if self.reading is not None:
            for name, width in (("key", config.recurrent_dim), ("value", config.width)):
                shape, axes = (batch_size, source_length, width), ("batch", "length", "state")
                specs[name] = CacheSpec(shape, axes, config.compute_dtype)
        return specs

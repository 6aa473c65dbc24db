"""The exact cost of a model in floating-point operations, counted from shapes; and the peaks of known chips.

A product of [m, k] and [k, n] counts 2 m k n. Norms, softmax and other elementwise work are left out, as in the
usual definition of model FLOPs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import jax

from transformer.config import RECURRENT, LayerKind, ModelConfig
from transformer.config.model import LinearMixer
from transformer.models.gated_linear_attention import DECAY_RANK
from transformer.models.mamba2 import num_groups
from transformer.models.parameters import ParameterSpec, Tree, map_specs
from transformer.models.patterns import count_pairs
from transformer.models.recurrence import CELLS

PEAK_FLOPS = {
    # Dense bfloat16 FLOP/s by `device_kind`, from the vendors' data sheets and the Cloud TPU documentation.
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclass(frozen=True)
class Product:
    """A matrix product of one sequence's forward pass, of all layers that have it together."""

    part: str
    """The kind of work that it belongs to, as `forward_flops` adds it up."""
    name: str
    flops: int
    causal_flops: int | None = None
    """What a causal mask leaves of them; None: all."""
    stack: str = ""
    """`encoder`, `decoder`, `future` or `output`."""

    def times(self, count: int, stack: str) -> "Product":
        """Returns the product of `count` layers of a stack."""
        causal = None if self.causal_flops is None else count * self.causal_flops
        return dataclasses.replace(self, flops=count * self.flops, causal_flops=causal, stack=stack)


def forward_products(config: ModelConfig, length: int, source_length: int = 0) -> list[Product]:
    """Returns every matrix product of one sequence's forward pass.

    Choices are counted that experts have no room for; padding columns of the vocabulary are not, nor experts that a token
    does not pass through; where experts choose, each token is taken to be chosen `experts_per_token` times. Mixers with a
    state count in their chunkwise form, whichever runs, all pairs of a chunk, and a short last chunk as a whole one. An
    encoder-decoder reads `source_length` tokens for the `length` that it writes.
    """
    assert config.vocab_size is not None
    found: list[Product] = []

    def stack(name: str, kinds: tuple[LayerKind, ...], layers: int, tokens: int, causal: bool) -> None:
        for kind in kinds:
            products = (*mixer_products(config, kind, tokens, causal), *_feedforward(config, kind, tokens))
            found.extend(product.times(layers // len(kinds), name) for product in products)

    def main(name: str, causal: bool) -> None:
        first = config.first_kinds
        stack(name, first, len(first), length, causal)
        stack(name, config.kinds, config.num_layers - len(first), length, causal)

    if config.has_encoder:
        if config.has_decoder:
            stack("encoder", config.encoder_kinds, config.encoder_depth, source_length, False)
        else:
            main("encoder", False)
    if config.has_decoder:
        main("decoder", True)
        if config.has_encoder:
            found.extend(_cross(config, length, source_length))
    if config.num_future_tokens:
        # Each further token: a joining map, a block and the logits.
        stack("future", config.kinds[-1:], config.num_future_tokens, length, True)
        join = Product("future_joins", "join", 2 * length * 2 * config.width * config.width)
        found.append(join.times(config.num_future_tokens, "future"))
    heads = [Product("logits", "logits", 2 * length * config.width * (config.num_labels or config.vocab_size))]
    if config.pooler if config.num_labels else config.head_transform:
        heads.insert(0, Product("logits", "before_head", 2 * length * config.width**2))
    return [*found, *(product.times(1 + config.num_future_tokens, "output") for product in heads)]


def forward_flops(config: ModelConfig, length: int, source_length: int = 0) -> dict[str, int]:
    """Returns the FLOPs of `forward_products` by part.

    Attention's products appear twice: `attention_scores` as if every pair of positions that a layer's pattern leaves were
    computed, and `attention_scores_causal` for the half (with the diagonal) that a causal mask leaves of them; an encoder
    has them in full in both.
    """
    names = ("attention_projections", "attention_scores", "attention_scores_causal", "feedforward")
    parts: dict[str, int] = dict.fromkeys(names, 0)
    for product in forward_products(config, length, source_length):
        parts[product.part] = parts.get(product.part, 0) + product.flops
        if product.causal_flops is not None:
            parts[f"{product.part}_causal"] += product.causal_flops
    return parts


def mixer_products(config: ModelConfig, kind: LayerKind, length: int, causal: bool) -> Iterator[Product]:
    """Yields the products of one layer's mixer over `length` tokens."""
    if kind.mixer in get_args(LinearMixer):
        yield from _linear(config, kind.mixer, length)
    elif kind.mixer in RECURRENT:
        yield from _recurrent(config, kind, length, causal)
    else:
        yield from _attention(config, kind, length, causal)


def _attention(config: ModelConfig, kind: LayerKind, length: int, causal: bool) -> Iterator[Product]:
    width, values = config.width, config.num_heads * config.head_dim
    keys = values
    if kind.mixer == "latent_attention":
        latent, query_latent = config.latent_width, config.query_latent_width
        keys = config.num_heads * (config.head_dim + config.rotary_head_width)
        maps = {"query": (width, keys)}
        if query_latent is not None:
            maps = {"query_down": (width, query_latent), "query_up": (query_latent, keys)}
        # Keys and values are made from the latents of all tokens.
        maps |= {
            "latent": (width, latent + config.rotary_head_width),
            "key": (latent, values),
            "value": (latent, values),
        }
    else:
        shared = config.kv_heads * config.head_dim
        maps = {"query": (width, keys), "key": (width, shared), "value": (width, shared)}
    for name, (inputs, outputs) in (maps | {"output": (values, width)}).items():
        yield Product("attention_projections", name, 2 * length * inputs * outputs)
    pairs, left = count_pairs(config, kind.pattern, length, causal)
    for name, columns in (("query_key", keys), ("weights_value", values)):
        yield Product("attention_scores", name, 2 * pairs * columns, 2 * left * columns)


def _feedforward(config: ModelConfig, kind: LayerKind, tokens: int) -> Iterator[Product]:
    hidden = config.ff_width if kind.feedforward == "dense" else 0
    if kind.feedforward == "experts":
        yield Product("feedforward", "router", 2 * tokens * config.width * config.num_experts)
        hidden = (config.experts_per_token + config.num_shared_experts) * config.expert_dim
    for name in ("up", *(("gate",) if config.gated else ()), "down") if hidden else ():
        yield Product("feedforward", name, 2 * tokens * config.width * hidden)


def _linear(config: ModelConfig, mixer: str, length: int) -> Iterator[Product]:
    """Yields a layer's projections, and its recurrence over the tokens in chunks."""
    width, heads, shared, keys, values = (
        config.width,
        config.num_heads,
        config.kv_heads,
        config.state_dim,
        config.head_dim,
    )
    read = heads * keys + shared * (keys + values)
    if mixer == "mamba2":
        read = 2 * num_groups(config) * keys + heads * values
    is_gated = mixer not in ("linear_attention", "performer")
    maps = {"query_key_value": width * read, "output": heads * values * width}
    if is_gated:
        maps["gate"] = width * heads * values
    if mixer == "gated_linear_attention":
        maps["decay"] = DECAY_RANK * (width + heads * keys)
    if mixer in ("gated_delta_net", "mamba2"):
        maps["decay"] = width * heads
    if mixer == "gated_delta_net":
        maps["step_size"] = width * heads
    if mixer == "performer":
        maps["features"] = 2 * heads * keys * config.num_features
        keys = config.num_features
    for name, cost in maps.items():
        yield Product("recurrence_projections", name, 2 * length * cost)
    values += 0 if is_gated else 1  # the sum of weights
    size = min(config.chunk_length, length)
    if mixer == "gated_delta_net":
        # Two products of keys or queries, the inverse, three products with it or the scores, the state's transition.
        pairs = size * size * (3 * keys + 2 * values) + size**3 // 3
        states = size * keys * (keys + 3 * values) + keys * keys * values
    else:
        pairs, states = size * size * (keys + values), 2 * size * keys * values
    chunks = heads * math.ceil(length / size)
    yield Product("recurrence", "within_chunks", 2 * chunks * pairs)
    yield Product("recurrence", "between_chunks", 2 * chunks * states)


def _gates(mixer: str) -> tuple[int, int]:
    """Returns the products of a recurrent layer with its input and with its state, in widths of the state."""
    cell = CELLS.get(mixer)
    return (2, 0) if cell is None else (cell.num_inputs, cell.num_products)


def _recurrent(config: ModelConfig, kind: LayerKind, tokens: int, causal: bool) -> Iterator[Product]:
    """Yields the products over all tokens at once, and the one in which each waits for the one before."""
    width, state = config.width, config.recurrent_dim
    inputs, products = _gates(kind.mixer)
    yield Product("recurrent_projections", "input", 2 * tokens * width * inputs * state)
    yield Product("recurrent_projections", "output", 0 if state == width else 2 * tokens * state * width)
    # An encoder's halves of the state go different ways, and know nothing of each other.
    yield Product("recurrent_products", "state", 2 * tokens * products * state * state // (1 if causal else 2))


def _cross(config: ModelConfig, length: int, source: int) -> Iterator[Product]:
    """Yields the products with which all layers of a decoder read its encoder."""
    width, layers = config.width, config.num_layers
    queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim

    def yielded(maps: dict[str, int], scores: dict[str, int], count: int) -> Iterator[Product]:
        for part, costs in (("cross_attention_projections", maps), ("cross_attention_scores", scores)):
            for name, cost in costs.items():
                yield Product(part, name, 2 * cost).times(count, "decoder")

    if config.cross_attention == "attention":
        maps = {"query": length * width * queries, "output": length * queries * width}
        maps |= {"key": source * width * keys, "value": source * width * keys}
        pairs = length * source * queries
        yield from yielded(maps, {"query_key": pairs, "weights_value": pairs}, layers)
    elif config.cross_attention == "luong":
        maps = {"key": source * width * width, "output": length * 2 * width * width}
        yield from yielded(
            maps, {"query_key": length * source * width, "weights_value": length * source * width}, layers
        )
    counts = [(kind, 1) for kind in config.first_kinds] + [(kind, config.num_periods) for kind in config.kinds]
    for kind, count in counts if config.cross_attention == "bahdanau" else ():
        state, (inputs, products) = config.recurrent_dim, _gates(kind.mixer)
        if products:
            # What was read is mapped to the output, and with it a state that would need no map by itself.
            outputs = width * (width + (state if state == width else 0))
            maps = {
                "query": length * state * state,
                "read": length * width * inputs * state,
                "output": length * outputs,
            }
            maps["key"] = source * width * state
            scores = {"query_key": length * source * state, "weights_value": length * source * width}
            yield from yielded(maps, scores, count)


def active_parameters(config: ModelConfig, specs: Tree) -> int:
    """Returns the number of parameters that a token passes through: of the experts of a layer, those that it chooses."""

    def active(spec: ParameterSpec) -> int:
        is_chosen = "experts" in spec.axes
        return spec.count * config.experts_per_token // config.num_experts if is_chosen else spec.count

    return sum(jax.tree.leaves(map_specs(active, specs)))


def training_flops_per_token(config: ModelConfig, length: int, causal: bool = False, source_length: int = 0) -> float:
    """Returns forward and backward FLOPs a token (of the target in an encoder-decoder): three times the forward pass, with
    attention in full or its causal half."""
    parts = forward_flops(config, length, source_length)
    parts.pop("attention_scores" if causal else "attention_scores_causal")
    return 3 * sum(parts.values()) / length


def peak_flops(device_kind: str, num_devices: int) -> float | None:
    """Returns the peak bfloat16 FLOP/s of the devices, or None where it is not known: MFU is then absent, not guessed."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else peak * num_devices

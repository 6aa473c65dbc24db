"""The exact cost of a model in floating-point operations, counted from shapes; and the peaks of known chips.

A product of [m, k] and [k, n] counts 2 m k n. Norms, softmax and other elementwise work are left out, as in the
usual definition of model FLOPs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from typing import get_args

import jax

from transformer.config import RECURRENT, LayerKind, ModelConfig
from transformer.config.model import LinearMixer
from transformer.models.linear_flops import linear_mixer_flops
from transformer.models.parameters import ParameterSpec, Tree, map_specs
from transformer.models.patterns import count_pairs
from transformer.models.recurrent_flops import cross_flops, layer_flops

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


def forward_flops(config: ModelConfig, length: int, source_length: int = 0) -> dict[str, int]:
    """Returns the FLOPs of one sequence's forward pass by part, each part over all layers.

    Attention's products appear twice: `attention_scores` as if every pair of positions that a layer's pattern leaves were
    computed, and `attention_scores_causal` for the half (with the diagonal) that a causal mask leaves of them; an encoder
    has them in full in both. Choices are counted that experts have no room for; padding columns of the vocabulary are not,
    nor experts that a token does not pass through; where experts choose, each token is taken to be chosen
    `experts_per_token` times. Mixers with a state count in their chunkwise form, whichever runs. An encoder-decoder reads
    `source_length` tokens for the `length` that it writes.
    """
    assert config.vocab_size is not None
    queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    names = ("attention_projections", "attention_scores", "attention_scores_causal", "feedforward")
    parts: dict[str, int] = {name: 0 for name in names}

    def stack(kinds: tuple[LayerKind, ...], layers: int, tokens: int, causal: bool) -> None:
        for kind in kinds:
            costs = mixer_flops(config, kind, tokens, causal)
            costs["feedforward"] = 2 * tokens * config.width * _feedforward_columns(config, kind)
            for name, flops in costs.items():
                parts[name] = parts.get(name, 0) + layers // len(kinds) * flops

    if config.has_decoder:
        stack(config.kinds, config.num_layers, length, True)
    if config.has_encoder:
        both = config.has_decoder
        depth, tokens = (config.encoder_depth, source_length) if both else (config.num_layers, length)
        stack(config.encoder_kinds, depth, tokens, False)
        if both:
            projections = 2 * config.width * (2 * length * queries + 2 * source_length * keys)
            parts["cross_attention_projections"] = config.num_layers * projections
            parts["cross_attention_scores"] = config.num_layers * 4 * length * source_length * queries
            if config.cross_attention != "attention":
                parts |= cross_flops(config, length, source_length)
    heads = config.num_future_tokens
    if heads:
        # Each further token: a joining map, a block and the logits.
        stack(config.kinds[-1:], heads, length, True)
        parts["future_joins"] = heads * 2 * length * 2 * config.width * config.width
    outputs = config.num_labels or config.vocab_size
    parts["logits"] = (1 + heads) * 2 * length * config.width * outputs
    return parts


def mixer_flops(config: ModelConfig, kind: LayerKind, length: int, causal: bool) -> dict[str, int]:
    """Returns the FLOPs of one layer's mixer over `length` tokens by part."""
    if kind.mixer in get_args(LinearMixer):
        return linear_mixer_flops(config, kind.mixer, length)
    if kind.mixer in RECURRENT:
        return layer_flops(config, kind, length, causal)
    queries, keys = config.num_heads * config.head_dim, config.kv_heads * config.head_dim
    projections, pair = config.width * (queries + 2 * keys + queries), 2 * queries
    if kind.mixer == "latent_attention":
        # Keys and values are made from the latents of all tokens.
        latent, query_latent = config.latent_width, config.query_latent_width
        query = config.num_heads * (config.head_dim + config.rotary_head_width)
        queried = config.width * query if query_latent is None else query_latent * (config.width + query)
        made = config.width * (latent + config.rotary_head_width) + 2 * latent * queries
        projections, pair = queried + made + queries * config.width, query + queries
    pairs, left = count_pairs(config, kind.pattern, length, causal)
    return {
        "attention_projections": 2 * length * projections,
        "attention_scores": 2 * pairs * pair,
        "attention_scores_causal": 2 * left * pair,
    }


def _feedforward_columns(config: ModelConfig, kind: LayerKind) -> int:
    """Returns the columns of all matrices of a layer that meet one token, the last one's transposed."""
    matrices = 3 if config.gated else 2
    if kind.feedforward == "experts":
        used = config.experts_per_token + config.num_shared_experts
        return config.num_experts + used * config.expert_dim * matrices
    return config.ff_width * matrices if kind.feedforward == "dense" else 0


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

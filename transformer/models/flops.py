"""The exact cost of a model in floating-point operations, counted from shapes; and the peaks of known chips.

A product of [m, k] and [k, n] counts 2 m k n. Norms, softmax and other elementwise work are left out, as in the
usual definition of model FLOPs (Chowdhery et al. 2022, arXiv:2204.02311, appendix B).
"""

from transformer.config import ModelConfig

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


def forward_flops(config: ModelConfig, length: int) -> dict[str, int]:
    """Returns the FLOPs of one sequence's forward pass by part, each part over all layers.

    Attention's products appear twice: `attention_scores` as if every pair of positions were computed, and
    `attention_scores_causal` for the half (with the diagonal) that a causal mask leaves. Padding columns of the
    vocabulary are not counted.
    """
    assert config.vocab_size is not None
    width, head = config.width, config.head_dim
    queries, keys = config.num_heads * head, config.kv_heads * head
    projections = 2 * length * width * (queries + 2 * keys + queries)
    feedforward = 2 * length * width * config.ff_width * (3 if config.gated else 2)
    return {
        "attention_projections": config.num_layers * projections,
        "attention_scores": config.num_layers * 4 * length * length * queries,
        "attention_scores_causal": config.num_layers * 2 * length * (length + 1) * queries,
        "feedforward": config.num_layers * feedforward,
        "logits": 2 * length * width * config.vocab_size,
    }


def training_flops_per_token(config: ModelConfig, length: int, causal: bool = False) -> float:
    """Returns forward and backward FLOPs a token: three times the forward pass, attention full or causal."""
    parts = forward_flops(config, length)
    parts.pop("attention_scores" if causal else "attention_scores_causal")
    return 3 * sum(parts.values()) / length


def peak_flops(device_kind: str, num_devices: int) -> float | None:
    """Returns the peak bfloat16 FLOP/s of the devices, or None where it is not known: MFU is then absent, not guessed."""
    peak = PEAK_FLOPS.get(device_kind)
    return None if peak is None else peak * num_devices

"""The cost of mixers with a state, counted from shapes as in `flops`."""

import math

from transformer.config import ModelConfig
from transformer.models.gated_linear_attention import DECAY_RANK
from transformer.models.mamba2 import num_groups


def linear_mixer_flops(config: ModelConfig, mixer: str, length: int) -> dict[str, int]:
    """Returns the FLOPs of one layer by part: its projections, and its recurrence over `length` tokens in chunks.

    All pairs of a chunk count, and a short last chunk as a whole one.
    """
    heads, shared, keys, values = config.num_heads, config.kv_heads, config.state_dim, config.head_dim
    read = heads * keys + shared * (keys + values)
    if mixer == "mamba2":
        read = 2 * num_groups(config) * keys + heads * values
    is_gated = mixer not in ("linear_attention", "performer")
    columns = read + (2 if is_gated else 1) * heads * values
    columns += {"gated_linear_attention": DECAY_RANK, "gated_delta_net": 2 * heads, "mamba2": heads}.get(mixer, 0)
    projections = length * config.width * columns
    if mixer == "gated_linear_attention":
        projections += length * DECAY_RANK * heads * keys
    if mixer == "performer":
        projections += length * 2 * heads * keys * config.num_features
        keys = config.num_features
    values += 0 if is_gated else 1  # the sum of weights
    size = min(config.chunk_length, length)
    if mixer == "gated_delta_net":
        # Two products of keys or queries, the inverse, three products with it or the scores, the state's transition.
        pairs = size * size * (3 * keys + 2 * values) + size**3 // 3
        states = size * keys * (keys + 3 * values) + keys * keys * values
    else:
        pairs, states = size * size * (keys + values), 2 * size * keys * values
    recurrence = heads * math.ceil(length / size) * (pairs + states)
    return {"recurrence_projections": 2 * projections, "recurrence": 2 * recurrence}

"""The cost of recurrent layers and of how they read an encoder, for `flops`."""

from transformer.config import LayerKind, ModelConfig

GATES = {"lstm": (4, 4), "gru": (3, 3), "mingru": (2, 0)}
"""Products of a layer with its input and with its state, in widths of the state."""


def layer_flops(config: ModelConfig, kind: LayerKind, tokens: int, causal: bool) -> dict[str, int]:
    """Returns the products of one layer: those over all tokens at once, and those that wait for each other."""
    width, state = config.width, config.recurrent_dim
    inputs, products = GATES[kind.mixer]
    outputs = 0 if state == width else state * width
    directions = 1 if causal else 2  # each of half the width
    return {
        "recurrent_projections": 2 * tokens * (width * inputs * state + outputs),
        "recurrent_products": 2 * tokens * products * state * state // directions,
    }


def cross_flops(config: ModelConfig, length: int, source_length: int) -> dict[str, int]:
    """Returns the projections, and the scores and weighted sums, with which all layers read the encoder."""
    width, state, layers = config.width, config.recurrent_dim, config.num_layers
    projections = scores = 0
    if config.cross_attention == "luong":
        projections = layers * width * width * (source_length + 2 * length)
        scores = layers * 2 * length * source_length * width
    for kind in config.kinds if config.cross_attention == "bahdanau" else ():
        inputs, products = GATES.get(kind.mixer, (0, 0))
        if products:
            # What was read is mapped to the output, and with it a state that would need no map by itself.
            outputs = width * (width + (state if state == width else 0))
            each = length * (state * state + width * inputs * state + outputs) + source_length * width * state
            projections += each * layers // len(config.kinds)
            scores += length * source_length * (state + width) * layers // len(config.kinds)
    return {"cross_attention_projections": 2 * projections, "cross_attention_scores": 2 * scores}

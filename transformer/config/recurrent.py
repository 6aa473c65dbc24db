"""What recurrent networks cannot do: checks that are loaded when a configuration has one."""

from collections.abc import Iterator

from transformer.config.model import RECURRENT, ModelConfig, parse_layers
from transformer.config.schema import Config


def _mixers(layers: str) -> set[str]:
    """Returns the mixers of a layer pattern, none of one that cannot be read."""
    try:
        return {kind.mixer for kind in parse_layers(layers)}
    except ValueError:
        return set()


def has_heads(model: ModelConfig) -> bool:
    """Returns whether any part of the network has heads, or cannot be read."""
    both = model.architecture == "encoder_decoder"
    used = _mixers(model.layers) | (_mixers(model.encoder_layers or model.layers) if both else set())
    return not used <= set(RECURRENT) or not used or (both and model.cross_attention == "attention")


def recurrent_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake."""
    model, both = config.model, config.model.architecture == "encoder_decoder"
    own, encoder = _mixers(model.layers), _mixers((model.encoder_layers if both else None) or model.layers)
    cross = f"model.cross_attention = {model.cross_attention!r}"
    if model.cross_attention != "attention" and not both:
        yield f"{cross}: only model.architecture = 'encoder_decoder' reads an encoder, not {model.architecture!r}"
    elif model.cross_attention == "bahdanau" and own and not own & {"lstm", "gru"}:
        reason = "it is part of the steps of lstm and gru, of which there is none"
        yield f"{cross}: {reason} in model.layers = {model.layers!r}"
    if model.architecture != "decoder" and encoder & set(RECURRENT) and model.recurrent_dim % 2:
        key = "width" if model.recurrent_width is None else "recurrent_width"
        yield f"model.{key} = {model.recurrent_dim}: must be even, for half of an encoder's recurrent state goes each way"
    if config.objective.name == "prefix_lm" and own & set(RECURRENT):
        reason = "a recurrent layer of a decoder cannot see a prefix both ways"
        yield f"model.layers = {model.layers!r}: {reason}, which objective.name = 'prefix_lm' needs"

"""What is wrong with a network: its heads, its positions, its patterns of layers. Loaded when a configuration is checked."""

import importlib
from collections.abc import Iterator
from typing import get_args

from transformer.config.model import RECURRENT, FeedForwardKind, Mixer, ModelConfig, Pattern, parse_layers
from transformer.config.schema import Config, known_vocab_size, nearest


def model_problems(config: Config, platform: str | None) -> Iterator[str]:
    """Yields a sentence for each mistake in `config.model`."""
    model, heads = config.model, f"model.num_heads = {config.model.num_heads}"
    own, encoder = _mixers(model)
    if (own | encoder) & set(RECURRENT) or model.cross_attention != "attention":
        yield from importlib.import_module("transformer.config.kinds").recurrent_problems(model, own, encoder)
    reads = model.architecture == "encoder_decoder" and model.cross_attention == "attention"
    if model.num_heads > 0 and (reads or not own or not own | encoder <= set(RECURRENT)):
        if model.head_width is None and model.width % model.num_heads:
            yield f"model.width = {model.width} is not divisible by {heads}: change one, or set model.head_width"
        elif model.positions == "rotary" and model.head_dim % 2:
            odd = f"{model.head_dim} (model.head_width, or model.width / model.num_heads)"
            yield f"model.positions = 'rotary' needs an even head width, not {odd}"
        if model.kv_heads > 0 and model.num_heads % model.kv_heads:
            yield f"{heads} is not divisible by model.num_kv_heads = {model.kv_heads}"
    if model.positions == "sinusoidal" and model.width % 2:
        yield f"model.positions = 'sinusoidal' needs an even model.width, not {model.width}"
    if model.positions == "relative":
        yield from importlib.import_module("transformer.config.kinds").bucket_problems(model)
    if model.matrix_products != "compute_dtype":
        yield from importlib.import_module("transformer.config.kinds").eight_bit_problems(model)
    if model.remat in ("names", "offload"):
        yield from importlib.import_module("transformer.config.kinds").remat_problems(model)
    if model.rotary_scaling == "dynamic_ntk":
        yield from importlib.import_module("transformer.config.kinds").scaling_problems(config)
    own_keys = (model.window_rotary_base, model.rotary_attention_factor, model.attention_biases)
    if any(own_keys) or "@none" in f"{model.first_layers} {model.layers} {model.encoder_layers}":
        yield from importlib.import_module("transformer.config.kinds").attention_problems(model)
    if model.embedding_norm or model.head_transform or model.num_token_types or model.decoder_start_token is not None:
        yield from importlib.import_module("transformer.config.kinds").head_problems(model)
    yield from _layer_problems(config)
    if model.attention_implementation != "auto":
        yield from importlib.import_module("transformer.config.implementations").problems_of_attention(config, platform)
    tokens = known_vocab_size(config.data)
    if model.vocab_size is not None and tokens is not None and model.vocab_size < tokens:
        advice = "give at least that, or leave it out"
        yield f"model.vocab_size = {model.vocab_size} is smaller than the tokenizer's {tokens} tokens: {advice}"
    length, rows = config.data.sequence_length, model.num_positions
    if model.positions == "learned" and rows is not None and rows < length:
        yield f"data.sequence_length = {length} is longer than model.num_positions = {rows}"


def _mixers(model: ModelConfig) -> tuple[set[str], set[str]]:
    """Returns the mixers of the stack and of its encoder, or of itself; none of a pattern that cannot be read."""
    try:
        own = {kind.mixer for kind in (*model.first_kinds, *model.kinds)}
        return own, own if model.architecture == "encoder" else {kind.mixer for kind in model.encoder_kinds}
    except ValueError:
        return set(), set()


def _layer_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in the patterns of layers."""
    model, num_first = config.model, 0
    depths = {"first_layers": {}} if model.first_layers is not None else {}
    depths |= {"layers": {"num_layers": model.num_layers}}
    if model.architecture == "encoder_decoder":
        key = "layers" if model.encoder_layers is None else "encoder_layers"
        depths.setdefault(key, {})["num_encoder_layers"] = model.encoder_depth
    for key, stacks in depths.items():
        label = f"model.{key} = {getattr(model, key)!r}"
        try:
            kinds = parse_layers(getattr(model, key))
        except ValueError as error:
            yield f"{label}: {error}"
            continue
        for kind in dict.fromkeys(kinds):
            for what, name, known in (
                ("mixer", kind.mixer, get_args(Mixer)),
                ("pattern", kind.pattern, get_args(Pattern)),
                ("feed-forward kind", kind.feedforward, get_args(FeedForwardKind)),
            ):
                if name not in known:
                    yield f"{label}: {name!r} is not a {what}, which are {', '.join(known)}{nearest(name, known)}"
        if any(kind.pattern == "block_sparse" for kind in kinds) and model.num_window_blocks % 2 == 0:
            yield f"model.num_window_blocks = {model.num_window_blocks}: must be odd, a block and as many on either side"
        if any(kind.mixer != "attention" or kind.feedforward == "experts" for kind in kinds):
            is_encoder = model.architecture == "encoder" or "num_encoder_layers" in stacks
            is_decoder = key != "encoder_layers" and model.has_decoder
            rules = importlib.import_module("transformer.config.kinds")
            yield from rules.problems_of_kinds(config, label, kinds, is_encoder, is_decoder)
        num_first = len(kinds) if key == "first_layers" else num_first
        for name, depth in stacks.items():
            first = num_first if name == "num_layers" else 0
            after = f" after the {first} of model.first_layers = {model.first_layers!r}" if first else ""
            if first and 0 < depth <= first:
                yield f"model.{name} = {depth} leaves no layer for {label}{after}"
            elif depth > 0 and (depth - first) % len(kinds):
                yield f"{label} is a period of {len(kinds)} layers, which does not divide model.{name} = {depth}{after}"

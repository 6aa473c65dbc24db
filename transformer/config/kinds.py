"""What kinds of layers besides attention and MLPs cannot do, and what else few configurations ask for.

Each check is loaded when a configuration has what it is about.
"""

import contextlib
import importlib.util
from collections.abc import Iterator
from typing import get_args

from transformer.config.model import RECURRENT, LayerKind, LinearMixer, Mixer, ModelConfig, parse_layers
from transformer.config.schema import Config, DataConfig, DataKind, OptimizerConfig, known_vocab_size, nearest

REMAT_NAMES = ("heads", "mixer_output", "feedforward_hidden")
"""Activations that carry a name for `model.remat`."""

_PAIRS = (("source_path", "target_path"), ("validation_source_path", "validation_target_path"))

_WITH_KEYS = ("attention", "latent_attention")


def problems_of_kinds(
    config: Config, label: str, kinds: tuple[LayerKind, ...], is_encoder: bool, is_decoder: bool
) -> Iterator[str]:
    """Yields a sentence for each mistake in a layer pattern, called `label`, that one or both of the stacks have."""
    model = config.model
    for kind in dict.fromkeys(kinds):
        if kind.mixer in get_args(Mixer) and kind.mixer not in _WITH_KEYS and kind.pattern != "full":
            yield f"{label}: only attention has keys that a pattern such as {kind.pattern} leaves out, not {kind.mixer}"
    if model.positions in ("alibi", "relative") and not any(kind.mixer in _WITH_KEYS for kind in kinds):
        yield f"{label}: model.positions = {model.positions!r} is a bias of attention, and no layer has attention"
    for mixer in dict.fromkeys(kind.mixer for kind in kinds):
        if mixer in (*get_args(LinearMixer), *RECURRENT) and config.objective.name == "prefix_lm":
            yield f"{label}: {mixer} cannot see a prefix both ways, as objective.name = 'prefix_lm' asks"
    if any(kind.feedforward == "experts" for kind in kinds):
        yield from _expert_problems(model, label, is_decoder)
    if any(kind.mixer == "latent_attention" for kind in kinds):
        yield from _latent_problems(model, label)
    for mixer in dict.fromkeys(kind.mixer for kind in kinds if kind.mixer in get_args(LinearMixer)):
        yield from _linear_problems(model, label, mixer, is_encoder)


def _expert_problems(model: ModelConfig, label: str, is_decoder: bool) -> Iterator[str]:
    routing, rate = f"model.routing = {model.routing!r}", f"model.balance_bias_rate = {model.balance_bias_rate}"
    if model.experts_per_token > model.num_experts:
        yield f"model.experts_per_token = {model.experts_per_token}: there are model.num_experts = {model.num_experts}"
    if model.routing == "expert_choice" and is_decoder:
        leak = "whether an expert chooses a token depends on later ones, which a decoder must not know"
        yield f"{routing} with {label}: {leak}; use 'token_choice'"
    elif model.routing == "expert_choice" and model.balance_bias_rate > 0:
        yield f"{rate}: experts that choose are evenly loaded; leave it at 0 for {routing}"
    groups, chosen = f"model.num_expert_groups = {model.num_expert_groups}", model.groups_per_token
    size = model.num_experts // model.num_expert_groups
    if model.num_expert_groups > 1 and model.routing == "expert_choice":
        yield f"{groups}: it is tokens that choose groups, and with {routing} they choose nothing"
    elif model.num_experts % model.num_expert_groups:
        yield f"{groups} does not divide model.num_experts = {model.num_experts}"
    elif model.num_expert_groups > 1 and size < 2:
        yield f"{groups}: model.num_experts = {model.num_experts} makes groups of one, and the best two count"
    if chosen > model.num_expert_groups:
        yield f"model.groups_per_token = {chosen}: there are {groups}"
    elif model.num_expert_groups > 1 and size > 1 and model.experts_per_token > chosen * size:
        few = f"model.groups_per_token = {chosen} with {groups} leaves a token {chosen * size} experts"
        yield f"model.experts_per_token = {model.experts_per_token}: {few}"


def _latent_problems(model: ModelConfig, label: str) -> Iterator[str]:
    if model.num_kv_heads not in (None, model.num_heads):
        yield f"model.num_kv_heads = {model.num_kv_heads} with {label}: latent_attention makes keys for every head"
    if model.qk_norm:
        yield f"model.qk_norm = True with {label}: latent_attention normalises what keys and queries are made from"
    if model.positions == "rotary" and model.rotary_head_width % 2:
        yield f"model.rotary_head_width = {model.rotary_head_width}: must be even, for rotary positions turn pairs"


def attention_problems(model: ModelConfig) -> Iterator[str]:
    """Yields a sentence for each key of rotary positions and biases that says something of layers that there are not."""
    kinds: list[LayerKind] = []
    for key in ("first_layers", "layers", "encoder_layers"):
        with contextlib.suppress(ValueError):  # a pattern that cannot be read has a sentence of its own
            found = parse_layers(getattr(model, key) or "attention")
            kinds += found
            without, label = (
                [kind.mixer for kind in found if not kind.has_positions],
                f"model.{key} = {getattr(model, key)!r}",
            )
            if without and model.positions != "rotary":
                yield f"{label}: @none leaves out rotary positions, and model.positions = {model.positions!r}"
            elif other := [mixer for mixer in without if mixer not in _WITH_KEYS]:
                yield f"{label}: {other[0]}@none is not possible, but attention@none and latent_attention@none"
    base = f"model.window_rotary_base = {model.window_rotary_base}"
    if model.window_rotary_base and model.positions != "rotary":
        yield f"{base}: needs model.positions = 'rotary', not {model.positions!r}"
    elif model.window_rotary_base and not any(kind.pattern == "window" for kind in kinds):
        yield f"{base}: no layer of model.layers = {model.layers!r} has a window"
    if model.rotary_attention_factor and model.rotary_scaling != "yarn":
        factor = f"model.rotary_attention_factor = {model.rotary_attention_factor}"
        yield f"{factor}: needs model.rotary_scaling = 'yarn', not {model.rotary_scaling!r}"
    if model.attention_biases and any(kind.mixer == "latent_attention" for kind in kinds):
        biases = f"model.attention_biases = {model.attention_biases!r}"
        yield f"{biases}: latent_attention has biases where model.biases says so"


def _linear_problems(model: ModelConfig, label: str, mixer: str, is_encoder: bool) -> Iterator[str]:
    if is_encoder:
        advice = "an encoder needs attention (model.encoder_layers has its own layers)"
        yield f"{label}: {mixer} sees only what came before; {advice}"
    if mixer == "retention" and model.positions == "rotary" and model.state_dim % 2:
        odd = f"{model.state_dim} (model.state_width, or the head's width)"
        yield f"{label}: model.positions = 'rotary' turns pairs of a key's dimensions, of which there are {odd}"


def recurrent_problems(model: ModelConfig, own: set[str], encoder: set[str]) -> Iterator[str]:
    """Yields a sentence for each mistake of a network with these mixers, itself and in its encoder."""
    if model.parametrization == "mup":
        rules = "it has no rules for recurrent networks and their attention; use 'standard'"
        yield f"model.parametrization = 'mup': {rules}"
    both = model.architecture == "encoder_decoder"
    cross = f"model.cross_attention = {model.cross_attention!r}"
    if model.cross_attention != "attention" and not both:
        yield f"{cross}: only model.architecture = 'encoder_decoder' reads an encoder, not {model.architecture!r}"
    elif model.cross_attention == "bahdanau" and own and not own & {"lstm", "gru"}:
        reason = "it is part of the steps of lstm and gru, of which there is none"
        yield f"{cross}: {reason} in model.layers = {model.layers!r}"
    if model.architecture != "decoder" and encoder & set(RECURRENT) and model.recurrent_dim % 2:
        key = "width" if model.recurrent_width is None else "recurrent_width"
        yield f"model.{key} = {model.recurrent_dim}: must be even, for half of an encoder's recurrent state goes each way"


def bucket_problems(model: ModelConfig) -> Iterator[str]:
    """Yields a sentence for each mistake in the buckets of relative positions, half of which have a distance each."""
    sides = {"decoder": (1,), "encoder": (2,), "encoder_decoder": (1, 2)}[model.architecture]
    buckets = f"model.num_relative_buckets = {model.num_relative_buckets}"
    exact = model.num_relative_buckets // (2 * min(sides))
    if model.num_relative_buckets < 2 * max(sides):
        yield f"{buckets}: model.architecture = {model.architecture!r} needs at least {2 * max(sides)}"
    elif model.max_relative_distance <= exact:
        distance = f"model.max_relative_distance = {model.max_relative_distance}"
        yield f"{distance}: must be more than {exact}, up to which distances have a bucket each ({buckets})"


def head_problems(model: ModelConfig) -> Iterator[str]:
    """Yields a sentence for each mistake in what stands before the first layer and after the last."""
    for key in ("embedding_norm", "head_transform"):
        if getattr(model, key) and model.norm == "none":
            yield f"model.{key} = True has a norm, and model.norm = 'none'"
    if model.head_transform and model.gated:
        yield f"model.head_transform = True has one map and no gate: not with model.activation = {model.activation!r}"
    if model.num_token_types and model.num_future_tokens:
        types = f"model.num_token_types = {model.num_token_types}"
        yield f"{types}: further tokens (model.num_future_tokens = {model.num_future_tokens}) have no types"
    start, size = model.decoder_start_token, model.vocab_size
    if start is not None and model.architecture != "encoder_decoder":
        yield f"model.decoder_start_token = {start}: only model.architecture = 'encoder_decoder' begins a text so"
    elif start is not None and size is not None and start >= size:
        yield f"model.decoder_start_token = {start}: must be below model.vocab_size = {size}"


def recall_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in the examples of associative recall."""
    label, pairs = f"objective.num_pairs = {config.objective.num_pairs}", config.objective.num_pairs
    if 3 * pairs > config.data.sequence_length:
        yield f"{label}: an example has 3 tokens a pair, more than data.sequence_length = {config.data.sequence_length}"
    tokens = known_vocab_size(config.data)
    if config.data.tokenizer != "bytes":
        yield f"data.tokenizer = {config.data.tokenizer!r}: 'associative_recall' needs 'bytes', whose tokens are known"
    elif tokens is not None and pairs > (tokens - 4) // 2:
        yield f"{label}: each pair needs a key of its own, and there are {(tokens - 4) // 2}"


def eight_bit_problems(model: ModelConfig) -> Iterator[str]:
    if importlib.util.find_spec("qwix") is None:
        wanted = f"model.matrix_products = {model.matrix_products!r}"
        yield f"{wanted} needs the package qwix (pip install -e '.[quantization]')"


def remat_problems(model: ModelConfig) -> Iterator[str]:
    """Yields a sentence for each name that no activation has; without any, it would be `full` by another name."""
    for name in model.remat_names:
        if name not in REMAT_NAMES:
            known = ", ".join(REMAT_NAMES)
            yield f"model.remat_names: {name!r} is none of {known}{nearest(name, REMAT_NAMES)}"
    if not model.remat_names:
        yield f"model.remat = {model.remat!r} needs model.remat_names; 'full' keeps nothing"


def schedule_free_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    name = f"optimizer.name = {optimizer.name!r}"
    if optimizer.schedule != "constant":
        wanted = "averages in the place of a schedule: it needs 'constant'"
        yield f"optimizer.schedule = {optimizer.schedule!r}: {name} {wanted}"
    if optimizer.beta1 == 0:
        yield f"optimizer.beta1 = {optimizer.beta1}: {name} needs more than 0"
    if optimizer.ema_decay:
        yield f"optimizer.ema_decay = {optimizer.ema_decay}: {name} averages the weights already; leave it at 0"


def source_problems(data: DataConfig, kind: DataKind, name: str) -> Iterator[str]:
    """Yields a sentence for each mistake in where examples come from that are not windows of text; `name` says whose."""
    given = [key for pair in _PAIRS for key in pair if getattr(data, key)]
    for pair in _PAIRS if kind == "pairs" else ():
        for one, other in (pair, pair[::-1]):
            if one in given and other not in given:
                yield f"data.{one} is given without data.{other}: every text to read needs one to write"
    if kind != "pairs" and given:
        yield f"data.{given[0]} = {getattr(data, given[0])!r}: only 'seq2seq' learns from pairs, not {name}"
    elif given and not (data.path or data.source_path or data.target_path):
        yield f"data.{given[0]} holds out pairs of data.source_path, which is not given: use data.validation_documents"
    if kind != "text" and data.validation_tail is not None:
        yield f"data.validation_tail = {data.validation_tail}: {name} holds out whole examples (data.validation_documents)"
    if kind in ("chat", "preferences"):
        yield from _chat_problems(data, kind, name, bool(given))
    elif kind != "text" and "python_stdlib" in data.source and not (data.path or given or data.prepared):
        fields = (
            "data.source_field and data.target_field" if kind == "pairs" else "data.text_field and data.label_field"
        )
        files = "data.source_path and data.target_path, or " if kind == "pairs" else ""
        records = f"records with {fields} by data.path, tfds:NAME or hf:NAME"
        wanted = "pairs" if kind == "pairs" else "texts with labels"
        yield f"data.source = 'python_stdlib' has no {wanted}, which {name} needs: give {files}{records}"


def _chat_problems(data: DataConfig, kind: DataKind, name: str, given: bool) -> Iterator[str]:
    if kind == "preferences" and "python_stdlib" in data.source and not (data.path or given or data.prepared):
        records = "records with prompt, chosen and rejected by data.path, tfds:NAME or hf:NAME"
        yield f"data.source = 'python_stdlib' has no preferences, which {name} needs: give {records}"
    if kind == "chat" and not (data.chat_template or data.tokenizer_path or data.prepared):
        yield f"data.chat_template is needed: {name} learns from conversations, and no data.tokenizer_path brings one"


def preference_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each thing that a loss over pairs of answers has no use for."""
    objective = config.objective
    if objective.label_smoothing >= 0.5:
        yield f"objective.label_smoothing = {objective.label_smoothing}: with 'dpo' it must be below 0.5, where none is right"
    if objective.dpo_loss == "ipo" and objective.label_smoothing:
        yield f"objective.label_smoothing = {objective.label_smoothing}: objective.dpo_loss = 'ipo' has none"
    if objective.z_loss:
        yield f"objective.z_loss = {objective.z_loss}: objective.name = 'dpo' has no such term"


def scaling_problems(config: Config) -> Iterator[str]:
    model, length = config.model, config.data.sequence_length
    if length > model.rotary_original_length:
        limit = f"data.sequence_length = {length} beyond {model.rotary_original_length}"
        reason = "texts in one row would be turned as the longest of them; train with another scaling"
        yield f"model.rotary_scaling = 'dynamic_ntk' with {limit} (model.rotary_original_length): {reason}"

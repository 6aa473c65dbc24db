"""config.json to ModelConfig and back, by a family's table."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from transformer.config import (
    Config,
    ConfigError,
    ModelConfig,
    from_tree,
    mentioned,
    nearest,
    problems_of,
    replace,
)
from transformer.huggingface.header import shown
from transformer.huggingface.table import REQUIRED, Family, kinds_of, layers_of

FIXED: Mapping[str, Any] = {"quantization_config": None}
"""What no family's config.json may say, and why is plain: the numbers would be others."""

HARMLESS = (
    *(
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_name_or_path",
        "auto_map",
        "use_cache",
    ),
    *(
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "return_dict",
        "output_attentions",
    ),
    *("output_hidden_states", "is_encoder_decoder", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    *("pretraining_tp", "initializer_range", "attention_dropout", "_attn_implementation_autoset", "unsloth_version"),
    *("task_specific_params", "finetuning_task", "language", "tokenizer_class", "prefix", "gradient_checkpointing"),
)
"""Keys that change nothing that any family computes."""


BIAS_RATE = 0.001
"""The step of biases on a router's choice in a model that was read: files have the biases, and not their step."""


def read_config(family: Family, theirs: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Returns the model that a config.json of the family describes; raises ConfigError with every mistake in it."""
    problems: list[str] = []
    ours: dict[str, Any] = dict(family.constants)
    names: dict[str, str] = {}
    for key, wanted in {**FIXED, **family.fixed}.items():
        if theirs.get(key, wanted) != wanted:
            problems.append(f"{key} = {shown(theirs[key])}: {family.model_type} is read with {wanted!r} alone")
    for key in family.keys:
        value = theirs.get(key.theirs, key.default)
        value = value(theirs) if callable(value) else value
        if value is REQUIRED:
            problems.append(f"{key.theirs} is missing")
        elif key.values is not None and not (isinstance(value, str | int | bool | None) and value in key.values):
            known = tuple(str(known) for known in key.values)
            problems.append(f"{key.theirs} = {shown(value)} is none of {', '.join(known)}{nearest(str(value), known)}")
        else:
            ours[key.ours] = value if key.values is None else key.values[value]
            names[key.ours] = key.theirs
    for translation in family.translations:
        try:
            ours.update(translation.read(theirs))
        except ConfigError as error:
            problems += error.problems
    if not problems:
        config, problems = from_tree({"model": ours})
        problems = problems or model_problems(config.model)
    if problems:
        raise ConfigError([f"{where}: {_in_their_words(problem, names)}" for problem in problems])
    return canonical(config.model)


def model_problems(model: ModelConfig) -> list[str]:
    """Returns what is wrong with a model, whatever trains it."""
    objectives = {"decoder": "causal", "encoder": "masked_lm", "encoder_decoder": "span_corruption"}
    objective = {"name": objectives[model.architecture]}
    config = replace(
        Config(),
        model=dataclasses.asdict(model),
        objective=objective,
        data={"sequence_length": 1, "tokenizer": "characters"},
    )
    return [problem for problem in problems_of(config) if any(key.startswith("model.") for key in mentioned(problem))]


def _in_their_words(problem: str, names: Mapping[str, str]) -> str:
    for ours, theirs in names.items():
        if problem.startswith(f"model.{ours} "):
            return f"{theirs}: {problem}"
    return problem


def write_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model, without what belongs to its tokenizer.

    Raises ConfigError, with every key that stands in the way, if the family cannot say what the model is.
    """
    problems: list[str] = []
    model = canonical(model)
    theirs: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type, **family.fixed}
    for key in family.keys:
        value = getattr(model, key.ours)
        if key.values is None:
            theirs[key.theirs] = value
        elif spelt := [name for name, known in key.values.items() if known == value and type(known) is type(value)]:
            theirs[key.theirs] = spelt[0]
        else:
            known = ", ".join(repr(known) for known in dict.fromkeys(key.values.values()))
            problems.append(f"model.{key.ours} = {value!r}: {family.model_type} knows {known}")
    for translation in family.translations:
        try:
            theirs.update(translation.write(model))
        except ConfigError as error:
            problems += error.problems
    for name, value in family.constants.items():
        if (own := getattr(model, name)) != value and not any(
            problem.startswith(f"model.{name} ") for problem in problems
        ):
            problems.append(f"model.{name} = {own!r}: {family.model_type} has {value!r}")
    if not problems:
        again = read_config(family, theirs, f"{family.model_type}'s config.json")
        for item in dataclasses.fields(ModelConfig):
            own, other = getattr(model, item.name), getattr(again, item.name)
            if own != other:
                problems.append(f"model.{item.name} = {own!r}: {family.model_type} has {other!r}")
    if problems:
        raise ConfigError(problems)
    return theirs


def laid_out(model: ModelConfig) -> ModelConfig:
    """Returns the canonical model with layers in the period of the model at hand, as its parameters are stacked."""
    return dataclasses.replace(canonical(model), first_layers=model.first_layers, layers=model.layers)


def canonical(model: ModelConfig) -> ModelConfig:
    """Returns the model with what it derives filled in, and what it does not use, or only trains with, at its default.

    Two models that compute the same are then equal.
    """
    default = ModelConfig()
    every = {*model.first_kinds, *model.kinds}
    every |= {*(model.encoder_kinds if model.architecture == "encoder_decoder" else ())}
    mixers, patterns = {kind.mixer for kind in every}, {kind.pattern for kind in every}
    scored = model.head_dim + ("latent_attention" in mixers) * model.rotary_head_width
    changes: dict[str, Any] = {
        **layers_of(kinds_of(model)),
        "num_kv_heads": model.kv_heads,
        "head_width": model.head_dim,
        "feedforward_width": model.ff_width,
        "attention_scale": 1 / math.sqrt(scored) if model.attention_scale is None else model.attention_scale,
    }
    if model.attention_biases == ("all" if model.biases else "none"):
        changes["attention_biases"] = None
    if "window" not in patterns or (model.window_rotary_base, model.rotary_scaling) == (model.rotary_base, "none"):
        changes["window_rotary_base"] = None
    if model.rotary_scaling == "yarn" and model.rotary_attention_factor is None:
        changes["rotary_attention_factor"] = 0.1 * math.log(model.rotary_factor) + 1 if model.rotary_factor > 1 else 1.0
    if model.balance_bias_rate:
        changes["balance_bias_rate"] = BIAS_RATE
    if model.parametrization == "standard":
        changes["base_width"] = default.base_width
        if model.embedding_scale is None:
            changes["embedding_scale"] = math.sqrt(model.width) if model.positions == "sinusoidal" else 1.0
    elif model.attention_scale is None:
        changes["attention_scale"] = 8 / model.head_dim
    if model.architecture == "encoder_decoder":
        changes["num_encoder_layers"] = model.encoder_depth
        changes["encoder_layers"] = model.layers if model.encoder_layers is None else model.encoder_layers
    else:
        changes |= {"num_encoder_layers": None, "encoder_layers": None, "cross_attention": default.cross_attention}
    experts = any(kind.feedforward == "experts" for kind in every)
    if experts:
        changes["expert_width"] = model.expert_dim
        if not any(kind.feedforward == "dense" for kind in every):
            changes["feedforward_width"] = default.feedforward_width
    training = (
        "dropout",
        "initial_scale",
        "depth_scaled_init",
        "balance_loss",
        "router_z_loss",
        "expert_pieces",
        "expert_capacity_factor",
    )
    run = (
        "scan_layers",
        "remat",
        "remat_names",
        "compute_dtype",
        "matrix_products",
        "attention_implementation",
        "context_attention",
    )
    unused = [*training, *run, "recurrence_form", "chunk_length"]
    uses = {
        ("latent_width", "query_latent_width", "rotary_head_width"): "latent_attention" in mixers,
        ("window",): bool({"window", "dilated"} & patterns),
        ("num_sinks",): "window" in patterns,
        ("dilation",): "dilated" in patterns,
        ("sparse_block", "num_global_blocks", "num_window_blocks", "num_random_blocks"): "block_sparse" in patterns,
        ("num_experts", "experts_per_token", "expert_width", "num_shared_experts", "routing", "router_score"): experts,
        ("balance_bias_rate", "normalize_expert_weights", "expert_scale"): experts,
        ("num_expert_groups", "groups_per_token"): experts,
        ("groups_per_token",): model.num_expert_groups > 1,
        ("qk_norm_over",): model.qk_norm,
        ("rotary_attention_factor",): model.rotary_scaling == "yarn",
        ("rotary_base", "rotary_share", "rotary_scaling", "rotary_factor"): model.positions == "rotary",
        ("rotary_factor", "rotary_original_length"): model.positions == "rotary" and model.rotary_scaling != "none",
        ("rotary_original_length",): model.rotary_scaling != "linear",
        ("num_relative_buckets", "max_relative_distance"): model.positions == "relative",
        ("num_features",): "performer" in mixers,
    }
    unused += [name for names, used in uses.items() if not used for name in names]
    return dataclasses.replace(model, **changes | {name: getattr(default, name) for name in unused})

"""What is wrong with the data, and with what the objective learns from them. Loaded when a configuration is checked."""

import importlib
import math
from collections.abc import Iterator

from transformer.config.schema import Config, DataConfig, data_kind, nearest, source_length


def data_problems(data: DataConfig) -> Iterator[str]:
    """Yields a sentence for each mistake in where text comes from, and how it is tokenised."""
    sources = ("python_stdlib", "local_text:PATH", "tfds:NAME", "hf:NAME")
    kinds = [source.partition(":")[0] for source in sources]
    if not (data.path or data.source_path or data.source):
        yield "data.source is empty: name at least one source, or give data.path"
    for source in () if data.path or data.source_path else data.source:
        kind, _, name = source.partition(":")
        if not (name if kind in kinds[1:] else source == "python_stdlib"):
            yield f"data.source = {source!r}: must be one of {', '.join(sources)}{nearest(kind, kinds)}"
    expected = 1 if data.path or data.source_path else len(data.source)
    if data.weights and len(data.weights) != expected:
        yield f"data.weights has {len(data.weights)} numbers for {expected} sources"
    if not all(0 < weight < math.inf for weight in data.weights):
        yield f"data.weights = {data.weights}: each must be a finite number greater than 0"
    if data.tokenizer == "huggingface" and not data.tokenizer_path:
        yield "data.tokenizer = 'huggingface' needs data.tokenizer_path, a tokenizer.json"
    if data.tokenizer == "bytes" and data.tokenizer_path:
        yield f"data.tokenizer_path = {data.tokenizer_path!r}: {data.tokenizer} has no file"


ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "causal": ("decoder",),
    "prefix_lm": ("decoder",),
    "fill_in_the_middle": ("decoder",),
    "multi_token": ("decoder",),
    "masked_lm": ("encoder",),
    "span_corruption": ("encoder_decoder",),
    "mixture_of_denoisers": ("encoder_decoder",),
    "seq2seq": ("encoder_decoder",),
    "sequence_classification": ("encoder", "decoder"),
    "token_classification": ("encoder", "decoder"),
    "regression": ("encoder", "decoder"),
    "span_extraction": ("encoder", "decoder"),
    "text_to_text": ("encoder_decoder",),
    "associative_recall": ("decoder",),
    "chat": ("decoder",),
    "dpo": ("decoder",),
}
"""What can learn each objective: who must predict a token may not see it, and who reads another text needs an encoder."""


def example_problems(config: Config) -> Iterator[str]:
    """Yields a sentence for each mistake in what the objective learns from, and where that comes from."""
    data, model, kind = config.data, config.model, data_kind(config)
    name = f"objective.name = {config.objective.name!r}"
    paths = (data.source_path, data.target_path, data.validation_source_path, data.validation_target_path)
    if kind != "text" or any(paths):
        yield from importlib.import_module("transformer.config.kinds").source_problems(data, kind, name)
    if model.architecture not in (fitting := ARCHITECTURES[config.objective.name]):
        yield f"model.architecture = {model.architecture!r}: {name} needs {' or '.join(map(repr, fitting))}"
    if (config.objective.name == "multi_token") != (model.num_future_tokens > 0):
        heads = f"model.num_future_tokens = {model.num_future_tokens}"
        yield f"{heads}: objective.name = 'multi_token' needs at least 1, the others 0, and this is {name}"
    yield from importlib.import_module("transformer.config.tasks").task_problems(config, kind, name)
    if config.objective.name == "dpo":
        yield from importlib.import_module("transformer.config.kinds").preference_problems(config)
    if config.objective.name == "associative_recall":
        yield from importlib.import_module("transformer.config.kinds").recall_problems(config)
    length, rows = source_length(config), model.num_positions
    if model.positions == "learned" and kind == "pairs" and rows is not None and rows < length:
        yield f"data.source_length = {length} is longer than model.num_positions = {rows}"

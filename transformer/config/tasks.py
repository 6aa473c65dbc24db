"""What is wrong with a task: its columns, its held-out data and its head. Loaded when a configuration is checked."""

from collections.abc import Iterator

from transformer.config.schema import Config, DataConfig, DataKind

CLASSIFIERS = ("sequence_classification", "token_classification")
NUM_OUTPUTS = {"regression": 1, "span_extraction": 2}
"""Numbers that heads give for each token which are of no classes."""
_ONE_A_TEXT = ("sequence_classification", "regression")
_WITH_SECOND = (*_ONE_A_TEXT, "span_extraction", "text_to_text")


def task_problems(config: Config, kind: DataKind, name: str) -> Iterator[str]:
    """Yields a sentence for each mistake; `name` says what the objective is."""
    data, model, objective = config.data, config.model, config.objective.name
    yield from _held_out_problems(data, kind, name)
    if objective in NUM_OUTPUTS and model.num_labels not in (0, wanted := NUM_OUTPUTS[objective]):
        yield f"model.num_labels = {model.num_labels}: {name} needs {wanted}, or leave it out"
    elif model.num_labels > 0 and kind != "labelled":
        known = "'sequence_classification' and 'token_classification'"
        yield f"model.num_labels = {model.num_labels}: only {known} have labels, not {name}"
    mask, size = config.objective.mask_token, model.vocab_size
    if mask is not None and size is not None and mask >= size:
        yield f"objective.mask_token = {mask}: must be below model.vocab_size = {size}"
    if data.second_text_field and objective not in _WITH_SECOND:
        yield f"data.second_text_field = {data.second_text_field!r}: {name} reads one text"
    elif objective == "span_extraction" and not data.second_text_field:
        fields = (
            "data.text_field of the question, data.second_text_field of the passage, data.label_field of the answers"
        )
        yield f"{name} needs three fields: {fields}"
    if config.objective.pooling != "auto" and objective not in _ONE_A_TEXT:
        yield f"objective.pooling = {config.objective.pooling!r}: {name} tells nothing of a whole text"
    if objective == "text_to_text" and data.source_path and not data.path:
        yield f"data.source_path = {data.source_path!r}: {name} learns from records; 'seq2seq' from files of lines as well"
    for key in ("source_prefix", "label_words") if objective != "text_to_text" else ():
        if value := getattr(data, key):
            yield f"data.{key} = {value!r}: only 'text_to_text' has it, not {name}"
    words = [word.partition("=") for word in data.label_words]
    for value, equals, word in words:
        if not (value and equals and word):
            yield f"data.label_words: {value + equals + word!r} is not of the form VALUE=WORD"
    for part, values in (("value", [value for value, *_ in words]), ("word", [word for *_, word in words])):
        if twice := sorted({value for value in values if values.count(value) > 1}):
            yield f"data.label_words: the {part} {twice[0]!r} stands there more than once"


def _held_out_problems(data: DataConfig, kind: DataKind, name: str) -> Iterator[str]:
    if data.validation_path and not data.path:
        yield f"data.validation_path = {data.validation_path!r} holds out files beside data.path, which is not given"
    if data.validation_path and data.validation_tail is not None:
        yield f"data.validation_tail = {data.validation_tail}: data.validation_path is what is held out; give one of them"
    if data.validation_split and not (data.path or data.source_path):
        others = [source for source in data.source if not source.startswith(("tfds:", "hf:"))]
        if others:
            label = f"data.validation_split = {data.validation_split!r}"
            yield f"{label}: data.source = {others[0]!r} has no splits, only tfds: and hf: have"

"""A task done for the records of a file: classes, numbers, answers or texts.

Records are read as those that a run has learned from, without their results; one that does not fit the model's rows is cut
at its end, a passage into overlapping pieces, and none is left out.
"""

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from transformer.checkpointing.loading import load_parameters
from transformer.checkpointing.run import Run
from transformer.config import Config, ConfigError, source_length, write_atomically
from transformer.data import answers, files
from transformer.data.forms import RECORDS, Form, form_of, read_fields
from transformer.data.shards import Window
from transformer.inference.predict_options import PredictOptions
from transformer.inference.prompts import bucket
from transformer.models.parameters import Tree
from transformer.models.transformer import MASKED_LOGIT, Transformer, apply
from transformer.objectives import objective_of
from transformer.objectives.pooling import pooled
from transformer.objectives.scores import answer_scores, classification_scores, regression_scores
from transformer.objectives.span_extraction import best_spans, scores
from transformer.parallel.sharding import global_array, local_rows, replicated, use_rules

Result = dict[str, Any]
"""What is written of one record, besides its texts: its `prediction` and what belongs to it."""


@dataclass(frozen=True)
class Record:
    """A record of the file: its texts, and what it says is right, which it need not."""

    texts: tuple[Any, ...]
    """Of each field a text, or a list of words."""
    right: Any
    """Label, labels, number or answers; None: not told."""


@dataclass
class Task:
    """A model and what it has to be told."""

    run: Run
    config: Config
    form: Form
    mesh: Mesh
    model: Transformer
    params: Tree
    batch_size: int
    max_tokens: int
    num_cut: int = 0
    """Records that were cut."""

    def window(self, record: Record) -> Window:
        """Returns what a row is made of, as `RowSplit.window` does: of a label that is not known any."""
        first, *others = record.texts
        unknown: Any = {"words": [0] * len(first), "answers": []}.get(self.form.target, 0)
        document = json.dumps([first, unknown, *others])
        ids, found = self.form.encode(document, self.run.tokenizer, {})
        ids = self.cut(ids, self.config.data.sequence_length)
        # The last token ends the text, and is no word's.
        label = np.append(found[: len(ids) - 1], 0) - 1 if self.form.words else np.zeros(len(ids), np.int32)
        return _window(ids) | {"labels": label}

    def cut(self, ids: np.ndarray, room: int) -> np.ndarray:
        """Returns as much of a text as there is room for, with its end."""
        if len(ids) <= room:
            return ids
        self.num_cut += 1
        return np.append(ids[: room - 1], ids[-1:])

    def outputs(self, windows: Sequence[Window], compute: Callable[[Any, Any], Any]) -> list[Any]:
        """Returns what `compute` makes of the model's outputs and the batch for each row, computed side by side."""
        objective, shards = objective_of(self.config), _shards(self.mesh)
        rows = [
            objective.example(self.config, self.run.tokenizer, window, np.random.default_rng(0)) for window in windows
        ]
        if self.config.model.has_encoder and self.config.model.has_decoder:
            rows = list(windows)
        step = jax.jit(
            lambda params, batch: compute(apply(self.model, params, batch), batch), out_shardings=replicated(self.mesh)
        )
        size = -(-min(self.batch_size, len(rows)) // shards) * shards
        held, found = local_rows(self.mesh, size), {}
        order = sorted(range(len(rows)), key=lambda number: -max(map(len, rows[number].values())))
        for start in range(0, len(order), size):
            numbers = order[start : start + size]
            batch = _stacked([rows[number] for number in numbers], size)
            local = {name: array[held] for name, array in batch.items()}
            values = jax.device_get(step(self.params, global_array(self.mesh, held, size, local)))
            for place, number in enumerate(numbers):
                found[number] = jax.tree.map(lambda array, place=place: array[place], values)
        return [found[number] for number in range(len(rows))]


def write_predictions(options: PredictOptions, run: Run, config: Config, mesh: Mesh) -> None:
    """Writes a line for each record. Raises ConfigError for what cannot be read, and for a model that has learned no task."""
    form = form_of(config)
    if config.objective.name not in METHODS:
        advice = "`transformer generate` continues texts"
        raise ConfigError(f"--workdir = {options.workdir!r}: {config.objective.name!r} is no task to predict; {advice}")
    target = Path(options.output).expanduser() if options.output else None
    if problems := list(_problems(options, target)):
        raise ConfigError(problems)
    records = _read(options.input, form, run, config)
    with jax.set_mesh(mesh), use_rules(config):
        model, params, _ = load_parameters(run, mesh, options.step, options.best, options.average)
        task = Task(run, config, form, mesh, model, params, options.batch_size, options.max_tokens)
        method, measure = METHODS[config.objective.name]
        results = method(task, records)
    names = [field for number, (_, field) in enumerate(form.fields) if number != 1]
    told = [
        dict(zip(names, record.texts, strict=True)) | result for record, result in zip(records, results, strict=True)
    ]
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in told)
    if jax.process_index() == 0:
        if target is not None:
            write_atomically(target, lines)
        else:
            print(lines, end="")
    if task.num_cut:
        print(f"{task.num_cut:,} of {len(records):,} texts were longer than the model's rows: cut", file=sys.stderr)
    if known := [(record, result) for record, result in zip(records, results, strict=True) if record.right is not None]:
        measured = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in measure(task, known).items())
        print(f"{len(known):,} of {len(records):,} records say what is right: {measured}", file=sys.stderr)


def _problems(options: PredictOptions, target: Path | None) -> Any:
    if not options.input:
        yield "--input is missing: name the file of records"
    elif not Path(options.input).expanduser().is_file():
        yield f"--input = {options.input!r}: does not exist, or is no file"
    if target is not None and not target.parent.is_dir():
        yield f"--output = {options.output!r}: the directory {target.parent} does not exist"
    elif target is not None and target.suffix != ".jsonl":
        yield f"--output = {options.output!r}: lines of JSON are written, so it must end in .jsonl"
    for name in ("batch_size", "max_tokens"):
        if (value := getattr(options, name)) < 1:
            yield f"--{name.replace('_', '-')} = {value}: must be greater than 0"


def _read(name: str, form: Form, run: Run, config: Config) -> list[Record]:
    """Returns the records of a file; a right result counts where each of them has one."""
    path = Path(name).expanduser()
    file = files.TextFile(path.name, path)
    names = [(key, field) for number, (key, field) in enumerate(form.fields) if number != 1]
    label_key, label_field = form.fields[1]
    found: list[Record] = []
    if file.kind in RECORDS:
        for record, where in read_fields(file, form):
            texts = tuple(_text(record, key, field, form, where) for key, field in names)
            if not all(texts):
                raise ConfigError(f"{where} has no text in {' or '.join(repr(field) for _, field in names)}")
            right = None
            if record.get(label_field) is not None:
                document = json.loads(form.document(record, where))
                right = document[1]
            found.append(Record(texts, right))
    elif len(names) == 1 and not form.words:
        lines = files.read_lines(file, form.errors)
        found = [Record((line,), None) for line in lines if line.strip()]
    else:
        raise ConfigError(f"--input = {name!r}: records with several fields come in {', '.join(RECORDS)} files")
    if not found:
        raise ConfigError(f"--input = {name!r}: is empty, so there is nothing to predict")
    for record in found if form.target in ("class", "words") and form.kind == "labelled" else ():
        _check_labels(record, run, config, label_key, label_field)
    return found


def _text(record: Mapping[str, Any], key: str, field: str, form: Form, where: str) -> Any:
    if not form.words:
        return files.text_of(record, field, form.errors, where, key)
    words = files.value_of(record, field, where, key)
    if isinstance(words, str):
        return words.split()
    return [files.text_of({field: word}, field, form.errors, where, key) for word in words]


def _check_labels(record: Record, run: Run, config: Config, key: str, field: str) -> None:
    for label in record.right if isinstance(record.right, list) else [record.right]:
        known = run.labels if isinstance(label, str) else range(config.model.num_labels)
        if label is not None and label not in known:
            raise ConfigError(
                f"{key} = {field!r}: the model knows no label {label!r}, only {', '.join(map(str, known))}"
            )


def _window(ids: np.ndarray) -> Window:
    return {"inputs": ids, "positions": np.arange(len(ids)), "segment_ids": np.ones(len(ids), np.int32)}


def _shards(mesh: Mesh) -> int:
    return mesh.shape["replica"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def _stacked(rows: Sequence[Window], size: int) -> dict[str, np.ndarray]:
    """Returns a batch of `size` rows, each array as long as its longest needs, and a little more."""
    batch = {}
    for name, first in rows[0].items():
        longest = bucket(max(len(row[name]) for row in rows))
        batch[name] = np.zeros((size, longest), np.float32 if first.dtype.kind == "f" else np.int32)
        for number, row in enumerate(rows):
            batch[name][number, : len(row[name])] = row[name]
    return batch


# Classes and numbers.


def _label(task: Task, number: int) -> Any:
    return task.run.labels[number] if number < len(task.run.labels) else number


def _number(task: Task, label: Any) -> int:
    return task.run.labels.index(label) if isinstance(label, str) else label


def _probabilities(task: Task, values: np.ndarray) -> dict[str, float]:
    return {str(_label(task, number)): round(float(share), 6) for number, share in enumerate(values)}


def _at(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns of each row the values [B, ...] of [B, T, ...] at the one token that has a weight."""
    return jnp.take_along_axis(values, jnp.argmax(weights, axis=1)[:, None, None], axis=1)[:, 0]


def classify(task: Task, records: Sequence[Record]) -> list[Result]:
    """Returns the most probable class of each text, and the probabilities of all."""

    def compute(outputs: Any, batch: Any) -> Any:
        found = pooled(task.config.objective, outputs, batch)
        return jax.nn.softmax(_at(found.logits(found.hidden), batch["weights"]))

    shares = task.outputs([task.window(record) for record in records], compute)
    return [
        {"prediction": _label(task, int(np.argmax(share))), "probabilities": _probabilities(task, share)}
        for share in shares
    ]


def classify_words(task: Task, records: Sequence[Record]) -> list[Result]:
    """Returns the most probable class of each word, with its probability. Words that were cut off have none."""

    def compute(outputs: Any, batch: Any) -> Any:
        return jax.nn.softmax(outputs.logits(outputs.hidden)), batch["weights"]

    found = []
    for record, (shares, weights) in zip(
        records, task.outputs([task.window(record) for record in records], compute), strict=True
    ):
        told = shares[weights > 0][: len(record.texts[0])]
        labels: list[Any] = [_label(task, int(number)) for number in np.argmax(told, axis=-1)]
        best: list[Any] = [round(float(share.max()), 6) for share in told]
        missing = [None] * (len(record.texts[0]) - len(labels))
        found.append({"prediction": labels + missing, "probabilities": best + missing})
    return found


def measure_classes(task: Task, known: Sequence[tuple[Record, Result]]) -> dict[str, float]:
    """Returns accuracy and what else is measured of classes; a word that was cut off is wrong."""
    right, found = [], []
    for record, result in known:
        several = isinstance(record.right, list)
        right += record.right if several else [record.right]
        found += result["prediction"] if several else [result["prediction"]]
    kept = [(_number(task, a), _number(task, b)) for a, b in zip(found, right, strict=True) if a is not None]
    predicted, targets = np.array(kept, int).reshape(-1, 2).T
    accuracy = {"accuracy": float(np.sum(predicted == targets)) / len(right)}
    return accuracy | classification_scores(predicted, targets, task.config.model.num_labels)


def predict_numbers(task: Task, records: Sequence[Record]) -> list[Result]:
    """Returns the number of each text."""

    def compute(outputs: Any, batch: Any) -> Any:
        found = pooled(task.config.objective, outputs, batch)
        return _at(found.logits(found.hidden), batch["weights"])[:, 0]

    return [{"prediction": float(it)} for it in task.outputs([task.window(record) for record in records], compute)]


def measure_numbers(task: Task, known: Sequence[tuple[Record, Result]]) -> dict[str, float]:
    """Returns the squared error and the correlations."""
    right, found = (np.array(it) for it in zip(*((r.right, result["prediction"]) for r, result in known), strict=True))
    return {"squared_error": float(np.mean((right - found) ** 2)), **regression_scores(found, right)}


# Answers.


def find_answers(task: Task, records: Sequence[Record]) -> list[Result]:
    """Returns the best answer of each question, empty where none is more probable, with its place in the passage.

    A passage that is too long is read in pieces that overlap by half; no answer is as probable as where it is least so.
    """
    tokenizer, length = task.run.tokenizer, task.config.data.sequence_length
    windows, places = [], []
    for number, record in enumerate(records):
        passage = answers.Passage(record.texts[1], tokenizer)
        asked = task.cut(
            np.concatenate([[tokenizer.bos], tokenizer.encode(record.texts[0]), [tokenizer.eos]]), length // 2
        )
        room = length - len(asked) - 1
        first = 0
        while True:
            ids = np.concatenate([asked, passage.ids[first : first + room], [tokenizer.eos]]).astype(np.int32)
            none = np.zeros((1, 2), np.int32)
            windows.append(_window(ids) | {"passage": np.array([len(asked)]), "answers": none})
            places.append((number, passage, first - len(asked)))
            if first + room >= len(passage.ids):
                break
            first += max(1, room // 2)

    def compute(outputs: Any, batch: Any) -> Any:
        starts, ends = scores(outputs, batch["may_answer"])
        first, last, score = best_spans(
            starts.at[:, 0].set(MASKED_LOGIT), ends.at[:, 0].set(MASKED_LOGIT), task.config.objective.max_answer_length
        )
        return first, last, score, starts[:, 0] + ends[:, 0]

    best: dict[int, tuple[float, str, int]] = {}
    nothing: dict[int, float] = {}
    for (number, passage, shift), (first, last, score, none) in zip(
        places, task.outputs(windows, compute), strict=True
    ):
        nothing[number] = min(nothing.get(number, float("inf")), float(none))
        if len(passage.ids) and (number not in best or score > best[number][0]):
            begin, end = int(first) + shift, int(last) + shift
            best[number] = float(score), passage.words(begin, end), int(passage.starts[begin])
    return [_answer(best.get(number), nothing[number]) for number in range(len(records))]


def _answer(best: tuple[float, str, int] | None, nothing: float) -> Result:
    if best is None or nothing > best[0]:
        return {"prediction": "", "start": None, "margin": None if best is None else round(nothing - best[0], 4)}
    return {"prediction": best[1], "start": best[2], "margin": round(best[0] - nothing, 4)}


def measure_answers(task: Task, known: Sequence[tuple[Record, Result]]) -> dict[str, float]:
    """Returns exact match and F1 of words, as SQuAD counts them."""
    pairs = [answer_scores(result["prediction"], [text for _, text in record.right]) for record, result in known]
    exact, f1 = np.mean(np.array(pairs), axis=0)
    return {"exact_match": float(exact), "f1": float(f1)}


# Texts.


def write(task: Task, records: Sequence[Record]) -> list[Result]:
    """Returns the text about each record that greedy search writes, or of the words for labels the most probable."""
    prompts = [task.form.prefix + " ".join(record.texts) for record in records]
    if task.form.label_words:
        return _rank(task, prompts, [word.split("=", 1)[1] for word in task.form.label_words])
    from transformer.inference.generate import generate
    from transformer.inference.prompts import batches_by_length, check_prompts
    from transformer.inference.sampling import Sampling

    check_prompts(task.model, task.run.tokenizer, prompts, task.max_tokens)
    draw = functools.partial(generate, task.model, task.params, task.run.tokenizer)
    found: dict[int, Result] = {}
    for batch in batches_by_length(task.run.tokenizer, prompts, task.batch_size):
        texts = draw(
            [prompts[number] for number in batch], task.max_tokens, Sampling(0.0), rows=[(n, 0) for n in batch]
        )
        found |= {number: {"prediction": text.text} for number, text in zip(batch, texts, strict=True)}
    return [found[number] for number in range(len(prompts))]


def _rank(task: Task, prompts: Sequence[str], words: Sequence[str]) -> list[Result]:
    """Returns the most probable of `words` about each prompt, and their probabilities among themselves."""
    tokenizer, windows = task.run.tokenizer, []
    for prompt in prompts:
        read = task.cut(np.append(tokenizer.encode(prompt), tokenizer.eos).astype(np.int32), source_length(task.config))
        for word in words:
            ids = np.concatenate([[tokenizer.bos], tokenizer.encode(word), [tokenizer.eos]]).astype(np.int32)
            row = {f"encoder_{name}": array for name, array in _window(read).items()} | _window(ids[:-1])
            windows.append(row | {"targets": ids[1:], "weights": np.ones(len(ids) - 1, np.float32)})

    def compute(outputs: Any, batch: Any) -> Any:
        logits = jax.nn.log_softmax(outputs.logits(outputs.hidden))
        found = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
        return jnp.sum(found * batch["weights"], axis=1)

    sums = np.array(task.outputs(windows, compute), np.float64).reshape(len(prompts), len(words))
    shares = np.exp(sums - sums.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    task.num_cut //= len(words) if task.num_cut else 1
    return [
        {
            "prediction": words[int(np.argmax(row))],
            "probabilities": {word: round(float(share), 6) for word, share in zip(words, row, strict=True)},
        }
        for row in shares
    ]


def measure_texts(task: Task, known: Sequence[tuple[Record, Result]]) -> dict[str, float]:
    """Returns the share of texts that are those that were wanted."""
    return {"exact_match": float(np.mean([result["prediction"] == record.right for record, result in known]))}


METHODS: dict[str, tuple[Callable[..., list[Result]], Callable[..., dict[str, float]]]] = {
    "sequence_classification": (classify, measure_classes),
    "token_classification": (classify_words, measure_classes),
    "regression": (predict_numbers, measure_numbers),
    "span_extraction": (find_answers, measure_answers),
    "seq2seq": (write, measure_texts),
    "text_to_text": (write, measure_texts),
}
"""How each task is done, and what is measured of it."""

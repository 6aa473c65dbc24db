"""What pretraining is worth: a classifier begun with a language model against one begun with random values, by number of labels.

Both have the same size, tokenizer, steps and rates, and are trained on the same sentences: the first so many of an order that
the seed gives. The language model has read the sentences of all, without their labels, and what other text is given. A third
begins with it too, and trains a LoRA adapter and the head alone.
"""

import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from transformer.arguments import load_config
from transformer.benchmarks.report import table
from transformer.checkpointing.fixed import MAY_CHANGE
from transformer.checkpointing.run import load_run
from transformer.config import Config, ConfigError, from_json, replace, to_json, write_atomically
from transformer.data import files
from transformer.data.forms import form_of
from transformer.data.sources import open_sources
from transformer.studies.study import Outcome, Shared, Study, Trial, last, spread, train_run

SHARES: dict[int | None, float] = {100: 1 / 15, 1000: 1 / 5, None: 1.0}
"""Share of train.num_steps by number of labels, None being all. A step of the recipe reads about forty sentences."""

ARMS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "scratch": lambda base: {"init_from": {"run": "", "allow_missing": ()}},
    "pretrained": lambda base: {},
    "lora": lambda base: {
        "init_from": {"run": "", "allow_missing": ()},
        "adapter": {"kind": "lora", "base_run": base.init_from.run},
        "optimizer": {"learning_rate": 10 * base.optimizer.learning_rate, "weight_decay": 0.0},
    },
}
"""What is changed of a run that begins with the language model, by name."""

PIECE = 2000
"""Characters from which on other text is cut, at the end of a paragraph, into documents."""


def prepare(base: Config, shared: Shared) -> Config:
    """Writes the sentences by seed and number of labels, trains the language model if none is given, and returns the recipe
    with both."""
    if shared.pretrained and shared.text:
        raise ConfigError(
            f"--text = {shared.text[0]!r}: the model of --pretrained has read what it has read; leave one out"
        )
    run = Path(shared.pretrained).expanduser().absolute() if shared.pretrained else None
    if run:
        own = ("num_labels", *(key.removeprefix("model.") for key in MAY_CHANGE if key.startswith("model.")))
        model = vars(load_run(run).config.model) | {name: getattr(base.model, name) for name in own}
        base = replace(base, model=model)
    data = shared.directory / "data"
    train, validation = _labelled(base, data)
    for seed in shared.seeds:
        order = random.Random(seed).sample(train, len(train))
        for count in SHARES:
            _write(data / f"train-{count or 'all'}-{seed}.jsonl", order[:count])
    _write(data / "validation.jsonl", validation)
    if not run:
        run = _pretrain(base, [record["text"] for record in train], shared)
    fields = {"text_field": "text", "second_text_field": "", "label_field": "label"}
    files_of = {
        "path": (str(data / "train-{count}-{seed}.jsonl"),),
        "validation_path": (str(data / "validation.jsonl"),),
    }
    tokenizer = {"tokenizer_path": str(run / "tokenizer")}
    return replace(
        base,
        data={"source": ("python_stdlib",), "validation_split": "", **fields, **files_of, **tokenizer},
        init_from={"run": str(run), "allow_missing": ("classifier/*",)},
    )


def _pretrain(base: Config, sentences: Sequence[str], shared: Shared) -> Path:
    """Trains the language model on the sentences and other text, if it is not trained yet, and returns its directory."""
    data, run = shared.directory / "data", shared.directory / "pretrained"
    _write(data / "sentences.jsonl", [{"text": sentence} for sentence in sentences])
    sources = [f"local_text:{data / 'sentences.jsonl'}"]
    if shared.text:
        _write(data / "text.jsonl", [{"text": piece} for piece in _pieces(shared.text)])
        sources.append(f"local_text:{data / 'text.jsonl'}")
    config = to_json(language_model(base, tuple(sources)))
    finished = run.with_suffix(".json")
    if not finished.exists():
        if train_run("the language model", from_json(config), run):
            raise ConfigError(f"the language model in {run} has diverged: give it another optimizer.learning_rate")
        write_atomically(finished, config)
    elif finished.read_text() != config:
        raise ConfigError(
            f"{finished} is of another language model: choose another --workdir, or delete {shared.directory}"
        )
    return run


def language_model(base: Config, sources: tuple[str, ...]) -> Config:
    """Returns the configuration of the language model: the recipe's network, and how `sst2_pretrain` is trained."""
    recipe, problems, _ = load_config("sst2_pretrain")
    assert not problems, problems
    data = {
        "source": sources,
        "weights": (1 / len(sources),) * len(sources),
        "validation_split": "",
        "text_field": "text",
    }
    own = {"cache_dir": base.data.cache_dir, "tokenizer_vocab_size": base.data.tokenizer_vocab_size}
    return replace(
        recipe,
        model=vars(base.model) | {"num_labels": 0},
        data=data | own,
        parallel=vars(base.parallel),
    )


def _labelled(base: Config, directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the records to learn from and those to measure on."""
    data = base.data
    found = {
        key: [
            _plain(file, directory / f"{key}-{number}.jsonl")
            for number, file in enumerate(files.find_files(names, f"data.{key}"))
        ]
        for key, names in (("path", data.path), ("validation_path", data.validation_path))
        if names
    }
    if any(plain for plains in found.values() for _, plain in plains):
        fields = {"text_field": "text", "label_field": "label"}
        base = replace(
            base, data={key: tuple(str(path) for path, _ in plains) for key, plains in found.items()} | fields
        )
    [corpus, *others] = open_sources(base)
    if others or corpus.held_out is None:
        raise ConfigError(
            "the study `transfer` needs one source of labels, with data.validation_path or data.validation_split"
        )
    form, splits = form_of(base), []
    for part in (corpus, corpus.held_out):
        documents = [
            json.loads(document)
            for number in range(len(part.documents.records))
            if (document := part.documents[number])
        ]
        if len(form.fields) > 2 or not documents:
            raise ConfigError("the study `transfer` needs records of one text and its label")
        splits.append([{"text": text, "label": label} for text, label in documents])
    return splits[0], splits[1]


def _plain(file: files.TextFile, target: Path) -> tuple[Path, bool]:
    """Returns a file of records; one of lines `LABEL TEXT`, as SST is often given, is written anew as such."""
    if file.kind != ".txt":
        return file.path, False
    records = []
    for number, line in enumerate(files.read_lines(file, "strict"), start=1):
        label, space, text = line.partition(" ")
        if not (label and space and text.strip()):
            raise ConfigError(f"{file.path}, line {number}, is not of the form LABEL TEXT")
        records.append({"text": text, "label": label})
    _write(target, records)
    return target, True


def _pieces(paths: Sequence[str]) -> Iterator[str]:
    """Yields the text of files in pieces of whole paragraphs."""
    for file in files.find_files(paths, "--text"):
        piece = ""
        for paragraph in re.split(r"\n\s*\n", "\n".join(files.read_lines(file, "strict"))):
            piece += paragraph + "\n\n"
            if len(piece) > PIECE:
                yield piece
                piece = ""
        if piece.strip():
            yield piece


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    write_atomically(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def trials(base: Config) -> list[Trial]:
    """Returns every beginning with every number of labels."""
    made = []
    path = base.data.path[0] if base.data.path else "train-{count}-{seed}.jsonl"
    for count, share in SHARES.items():
        name = str(count or "all")
        rare, own = {"every_steps": 0}, {"path": (path.replace("{count}", name),)}
        train = {"num_steps": max(1, round(share * base.train.num_steps))}
        for arm, change in ARMS.items():
            config = replace(base, data=own, train=train, evaluation=rare, checkpoint=rare)
            config = replace(config, **change(base))
            made.append(Trial(f"{arm}_{name}", config, {"beginning": arm, "labels": count}))
    return made


def report(outcomes: Sequence[Outcome]) -> str:
    """Returns the accuracy of each beginning by number of labels, and by how much the pretrained one is better."""
    rows = []
    for count in dict.fromkeys(outcome.facts["labels"] for outcome in outcomes):
        by_arm = {arm: _accuracies(outcomes, arm, count) for arm in ARMS}
        scratch, pretrained = by_arm["scratch"], by_arm["pretrained"]
        more = "–"
        if scratch and pretrained:
            more = f"{sum(pretrained) / len(pretrained) - sum(scratch) / len(scratch):+.1f}"
        rows.append([f"{count:,}" if count else "all", *(spread(values, 1) for values in by_arm.values()), more])
    header = ["labels", *(arm.replace("_", " ") for arm in ARMS), "pretraining adds"]
    facts = {outcome.facts["beginning"]: outcome for outcome in outcomes}
    shares = [
        f"{arm.replace('_', ' ')} trains {one.trained_parameters:,} of {one.parameters:,} parameters"
        f" ({one.trained_parameters / one.parameters:.2%})."
        for arm, one in facts.items()
        if one.trained_parameters < one.parameters
    ]
    text = "Accuracy in percent, mean and standard deviation over seeds."
    return "\n\n".join([text, table(header, rows).rstrip(), " ".join(shares)])


def draw(outcomes: Sequence[Outcome], figure: Any) -> None:
    """Draws the accuracy of every run over the number of labels, and the means of each beginning."""
    axes = figure.subplots()
    counts = list(dict.fromkeys(outcome.facts["labels"] for outcome in outcomes))
    for arm, color in zip(ARMS, ("#c8452c", "#2f6db3", "#3a8a4d", "#8a5fb0"), strict=False):
        found = {place: _accuracies(outcomes, arm, count) for place, count in enumerate(counts)}
        points = [(place, value) for place, values in found.items() for value in values]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, alpha=0.5)
            means = [(place, sum(values) / len(values)) for place, values in found.items() if values]
            axes.plot(*zip(*means, strict=True), color=color, label=arm.replace("_", " "))
    axes.set(xlabel="sentences with labels", ylabel="accuracy (%)")
    axes.set_xticks(range(len(counts)), [f"{count:,}" if count else "all" for count in counts])
    axes.legend(frameon=False)


def _accuracies(outcomes: Sequence[Outcome], arm: str, count: int | None) -> list[float]:
    group = [it for it in outcomes if (it.facts["beginning"], it.facts["labels"]) == (arm, count)]
    return [100 * value for value in last(group, "accuracy")]


STUDY = Study(trials, report, draw, prepare)

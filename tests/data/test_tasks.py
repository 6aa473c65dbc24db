"""Data of tasks: tables, pairs of texts, numbers, answers, words for labels, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transformer.config import Config, ConfigError, problems_of, replace
from transformer.data.answers import Passage, answers_of
from transformer.data.files import TextFile
from transformer.data.forms import form_of, read_documents
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.data.prepare import prepare
from transformer.data.prepared import Prepared
from transformer.data.tokenizers import BOS, EOS
from transformer.objectives import objective_of

MakeConfig = Callable[..., Config]
PASSAGE = "The (old) tower,  1889, stands in  Paris."


class TinyGlue(tfds.core.GeneratorBasedBuilder):
    """Sentences with a class, divided as the tasks of GLUE are."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=["yes", "no", "maybe"])
        features = tfds.features.FeaturesDict({"sentence": tfds.features.Text(), "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"train": self._generate_examples(12), "validation_matched": self._generate_examples(5)}

    def _generate_examples(self, count: int):
        yield from ((number, {"sentence": f"{count} {number}", "label": number % 3}) for number in range(count))


@pytest.fixture
def task_config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from the contents of a file, its name, an objective and keys of `data` to a configuration."""

    def make(text: str = "", name: str = "a.csv", objective: str = "sequence_classification", **data: Any) -> Config:
        if text:
            (tmp_path / name).write_text(text, newline="")
            data = {"path": (str(tmp_path / name),)} | data
        config = make_config(**({"validation_documents": 0.3, "sequence_length": 64} | data))
        architecture = "encoder_decoder" if objective in ("text_to_text", "seq2seq") else "encoder"
        return replace(config, objective={"name": objective}, model={"architecture": architecture})

    return make


def documents_of(config: Config, path: Path) -> list[Any]:
    return [json.loads(text) for text in read_documents(TextFile(path.name, path), form_of(config))]


def windows_of(prepared: Prepared, split: str = "train") -> list[dict[str, np.ndarray]]:
    found: Any = getattr(prepared.sources[0], split)
    return [found.window(number) for number in range(found.num_windows)]


def texts_of(prepared: Prepared, window: dict[str, np.ndarray]) -> dict[str, float]:
    """Text, with a bar where each part ends, and label of every example in a row."""
    found = {}
    for number in range(1, int(window["segment_ids"].max()) + 1):
        here = window["segment_ids"] == number
        assert window["inputs"][here][0] == BOS and len(set(window["labels"][here].tolist())) == 1
        parts = np.split(window["inputs"][here], np.flatnonzero(window["inputs"][here] == EOS) + 1)
        found["|".join(prepared.tokenizer.decode(part) for part in parts)] = window["labels"][here][0]
    return found


def test_tables_are_records(task_config: Callable[..., Config], tmp_path: Path) -> None:
    table = '\ufefflabel,text,more\r\n1,"one, ""two""\nthree",x\r\n\r\n0, four ,y\r\nyes,été,\r\n'
    config = task_config(table)
    assert documents_of(config, tmp_path / "a.csv") == [['one, "two"\nthree', 1], [" four ", 0], ["été", "yes"]]
    task_config('label\ttext\n1\tsays "so\n\n0\ta, b\n', "a.tsv")
    assert documents_of(config, tmp_path / "a.tsv") == [['says "so', 1], ["a, b", 0]]
    words = task_config("text,label\nEU rejects it,B-ORG O O\n1 2,0 3\n", objective="token_classification")
    found = documents_of(words, tmp_path / "a.csv")
    assert found == [[["EU", "rejects", "it"], ["B-ORG", "O", "O"]], [["1", "2"], [0, 3]]]
    # For running text a file is one document, as it stands.
    [whole] = read_documents(TextFile("a.tsv", tmp_path / "a.tsv"), form_of(Config()))
    assert whole.startswith("label\ttext")


@pytest.mark.parametrize(
    ("table", "objective", "message"),
    [
        ("text,label\na,1\nb\n", "", r"a\.csv, line 3, has 1 field, and the first line names 2: text, label$"),
        ('text,label\n"a\nb",1,2\n', "", r"a\.csv, line 3, has 3 fields, and the first"),
        ('text,label\n"a"b,1\n', "", r"a\.csv, line 2, is not CSV: "),
        ('text,label\n"a,1\n', "", r"a\.csv, line 2, is not CSV: "),
        ("text,text\na,1\n", "", r"a\.csv, line 1, names the column 'text' more than once"),
        ("\n\n", "", r"a\.csv is empty: its first line has to name the columns"),
        ("text,label\n", "", r"the corpus is empty: no document in .*a\.csv"),
        ("text,labels\na,1\n", "", r"data\.label_field = 'label': .*line 2, has the fields labels, text \(did you mean la"),
        ("text,label\na,1\nb,\n", "", r"data\.label_field = 'label': .*a\.csv, line 3, has no label there"),
        ("text,label\na,-1\n", "", r"line 2, has -1 there: a label is text or a whole number from 0 on"),
        ("text,label\na,1.5\nb,\n", "regression", r"line 3, has no number there"),
        ("text,label\na,nan\n", "regression", r"line 2, has nan there, not a finite number"),
        ("text,label\na,x\n", "regression", r"line 2, has 'x' there, not a finite number"),
        ("text,label\na b,O\n", "token_classification", r"line 2, has 1 labels for 2 words"),
    ],
)  # fmt: skip
def test_mistakes_in_tables(task_config: Callable[..., Config], table: str, objective: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(task_config(table, objective=objective or "sequence_classification"), False)


def test_pairs_of_texts_with_a_class_or_a_number(task_config: Callable[..., Config], tmp_path: Path) -> None:
    rows = [(f"premise {number}", f"so {number}", number) for number in range(12)]
    table = "a\tb\tlabel\n" + "".join(f"{a}\t{b}\t{n % 2}\n" for a, b, n in rows)
    fields = {"text_field": "a", "second_text_field": "b", "validation_path": (str(tmp_path / "held.tsv"),)}
    (tmp_path / "held.tsv").write_text("a\tb\tlabel\nheld out\tyes\t1\n\tempty\t0\n")
    prepared = prepare(task_config(table, "a.tsv", **fields), False)
    found = {text: label for window in windows_of(prepared) for text, label in texts_of(prepared, window).items()}
    assert found == {f"{a}|{b}|": n % 2 for a, b, n in rows}
    [window] = windows_of(prepared, "validation")
    assert texts_of(prepared, window) == {"held out|yes|": 1}
    assert prepared.num_labels == 2 and prepared.labels == ()
    table = "a\tb\tlabel\n" + "".join(f"{a}\t{b}\t{n / 7 - 0.5}\n" for a, b, n in rows)
    prepared = prepare(task_config(table, "a.tsv", "regression", **fields), False)
    found = {text: label for window in windows_of(prepared) for text, label in texts_of(prepared, window).items()}
    assert found == {f"{a}|{b}|": np.float32(n / 7 - 0.5) for a, b, n in rows} and prepared.num_labels == 1
    assert prepared.sources[0].train.num_tokens == 12


def test_labels_that_are_only_validated(task_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("text,label\nb,1\n")
    with pytest.raises(ConfigError, match=r"the label 1 occurs in the validation split alone"):
        prepare(task_config("text,label\na,0\nc,2\n", validation_path=(str(tmp_path / "held.csv"),)), False)


def test_a_split_of_tfds_is_held_out_and_its_labels_have_names(
    task_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "datasets"))
    data = {"source": ("tfds:tiny_glue",), "text_field": "sentence", "validation_split": "validation_matched"}
    prepared = prepare(task_config(**data), False)
    assert prepared.labels == ("yes", "no", "maybe") and prepared.num_labels == 3
    held = {text for window in windows_of(prepared, "validation") for text in texts_of(prepared, window)}
    assert held == {f"5 {number}|" for number in range(5)}
    assert sum(len(texts_of(prepared, window)) for window in windows_of(prepared)) == 12
    message = (
        r"data\.validation_split = 'validation': tiny_glue has the splits train, validation_matched \(did you mean"
    )
    with pytest.raises(ConfigError, match=message):
        prepare(task_config(**data | {"validation_split": "validation"}), False)


def test_a_passage_is_read_word_by_word() -> None:
    passage = Passage(PASSAGE, ByteTokenizer())
    assert ByteTokenizer().decode(passage.ids) == PASSAGE
    for answer in ("1889", "(old) tower", "Paris", "The", "old", "tower,  1889", "."):
        span = passage.span((PASSAGE.index(answer), answer))
        assert passage.words(*span) == answer
    # An answer that cuts a word has the whole of it, and space around one is none of it.
    assert passage.words(*passage.span((PASSAGE.index("ow"), "ow"))) == "tower"
    assert passage.words(*passage.span((PASSAGE.index("  Paris"), "  Paris"))) == "Paris"


def test_questions_have_rows_of_their_own(task_config: Callable[..., Config]) -> None:
    given = [
        {"question": "When?", "context": PASSAGE, "answers": {"text": ["1889"], "answer_start": [17]}},
        {"question": "Where?", "context": PASSAGE, "answers": [{"text": t, "answer_start": PASSAGE.index(t)} for t in ("Paris", "in")]},
        {"question": "Why?", "context": PASSAGE, "answers": {"text": [], "answer_start": []}},
    ]  # fmt: skip
    assert PASSAGE[18:22] == "1889"
    given[0]["answers"]["answer_start"] = [18]
    fields = {"text_field": "question", "second_text_field": "context", "label_field": "answers"}
    lines = "".join(json.dumps(record) + "\n" for record in given * 6)
    config = task_config(lines, "a.jsonl", "span_extraction", **fields)
    prepared = prepare(config, False)
    found = set()
    for window in windows_of(prepared) + windows_of(prepared, "validation"):
        row = objective_of(config).example(config, prepared.tokenizer, window, np.random.default_rng(0))
        known = row["answer_starts"] > 0
        spans = list(zip(row["answer_starts"][known] - 1, row["answer_ends"][known] - 1, strict=True))
        asked = prepared.tokenizer.decode(row["inputs"]).removesuffix(PASSAGE)
        found.add((asked, *(prepared.tokenizer.decode(row["inputs"][a : b + 1]).strip() for a, b in spans)))
        may = np.flatnonzero(row["may_answer"])
        assert may[0] == 0 and prepared.tokenizer.decode(row["inputs"][may[1:]]) == PASSAGE
        assert row["weights"].tolist() == [1.0] + [0.0] * (len(row["weights"]) - 1)
    assert found == {("When?", "1889"), ("Where?", "Paris", "in"), ("Why?", "")}
    assert prepared.num_labels == 2


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"text": ["x"]}, "an object there without lists of equal length 'answer_start' and 'text'"),
        ("1889", "has '1889' there: answers are lists"),
        ([{"text": "1889"}], "has an answer {'text': '1889'}: it needs"),
        ([{"text": "1889", "answer_start": 3}], "has the answer '1889' at character 3, where the passage has ' .ol'"),
    ],
)
def test_answers_that_are_not_there(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        answers_of(value, PASSAGE, "place")


def test_labels_are_written_as_words(task_config: Callable[..., Config], tmp_path: Path) -> None:
    table = "premise,hypothesis,gold\nIt rains.,It is wet.,0\nIt rains.,It is dry.,2\n"
    fields = {"source_field": "premise", "second_text_field": "hypothesis", "target_field": "gold"}
    fields |= {"source_prefix": "nli: ", "label_words": ("0=true", "2=false")}
    config = task_config(table, objective="text_to_text", **fields)
    documents = documents_of(config, tmp_path / "a.csv")
    assert documents == [["nli: It rains. It is wet.", "true"], ["nli: It rains. It is dry.", "false"]]
    (tmp_path / "a.csv").write_text(table + "a,b,1\n")
    with pytest.raises(ConfigError, match=r"line 4, has '1' there, and data\.label_words has a word for '0', '2'"):
        documents_of(config, tmp_path / "a.csv")


@pytest.mark.parametrize(
    ("objective", "changes", "message"),
    [
        ("regression", {"model": {"num_labels": 3}}, "model.num_labels = 3: objective.name = 'regression' needs 1"),
        ("span_extraction", {}, "objective.name = 'span_extraction' needs three fields: data.text_field of the question"),
        ("token_classification", {"data": {"second_text_field": "b"}}, "data.second_text_field = 'b': objective.name"),
        ("token_classification", {"objective": {"pooling": "mean"}}, "objective.pooling = 'mean': objective.name = 'tok"),
        ("regression", {"data": {"source_prefix": "x"}}, "data.source_prefix = 'x': only 'text_to_text' has it"),
        ("text_to_text", {"data": {"label_words": ("0",)}}, "data.label_words: '0' is not of the form VALUE=WORD"),
        ("text_to_text", {"data": {"label_words": ("0=a", "1=a")}}, "data.label_words: the word 'a' stands there more"),
        ("regression", {"data": {"path": (), "source": ("tfds:x",), "validation_path": ("b",)}}, "data.validation_path ="),
        ("regression", {"data": {"path": (), "source": ("local_text:x",), "validation_split": "b"}}, "has no splits"),
    ],
)  # fmt: skip
def test_mistakes_in_tasks(objective: str, changes: dict[str, Any], message: str) -> None:
    config = replace(Config(), data={"path": ("a.csv",)}, objective={"name": objective})
    config = replace(config, model={"architecture": "encoder_decoder" if objective == "text_to_text" else "encoder"})
    assert any(message in problem for problem in problems_of(replace(config, **changes)))


def test_old_kinds_of_data_keep_their_fingerprints(task_config: Callable[..., Config]) -> None:
    """What was prepared before there were tasks is found again."""
    form = form_of(task_config("text,label\na,1\n"))
    fields = (("data.text_field", "text"), ("data.label_field", "label"))
    assert form.key == ("labelled", fields, "strict", False) and form_of(Config()).key == ()

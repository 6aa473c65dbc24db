"""Sources become documents: built by TFDS, found in TFDS, or opened by Hugging Face `datasets`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from transformer.config import Config, ConfigError
from transformer.data.sources import Corpus, open_sources

MakeConfig = Callable[..., Config]


class LetterTexts(tfds.core.GeneratorBasedBuilder):
    """A dataset of somebody else's, registered with TFDS by being defined."""

    VERSION = tfds.core.Version("1.2.3")
    url_infos = {}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"letter": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}
        )
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict:
        return {"test": iter([(0, {"letter": "no", "label": 0})]), "train": self._generate_examples()}

    def _generate_examples(self):
        for i, letter in enumerate("abcé"):
            yield i, {"letter": letter * 3, "label": i % 2}


def texts(corpus: Corpus) -> list[str]:
    return [corpus.documents[i] for i in range(len(corpus.documents.records))]


def test_local_text_is_stored_once_until_a_file_changes(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name in ("b.txt", "a.md"):
        (tmp_path / "texts" / name).write_text(f"text of {name}\n")
    config = make_config(path=(str(tmp_path / "texts"),))
    (corpus,) = open_sources(config)
    assert texts(corpus) == ["text of a.md\n", "text of b.txt\n"]
    stored = sorted((tmp_path / "cache").rglob("*.array_record*"))
    assert [path.parent.parent.name for path in stored] == ["local_text"]
    times = [path.stat().st_mtime_ns for path in stored]
    (again,) = open_sources(config)
    assert texts(again) == texts(corpus) and again.fingerprint == corpus.fingerprint
    assert [path.stat().st_mtime_ns for path in stored] == times
    (tmp_path / "texts" / "a.md").write_text("changed é\r\n")
    (changed,) = open_sources(config)
    assert changed.fingerprint != corpus.fingerprint
    assert texts(changed) == ["changed é\r\n", "text of b.txt\n"]


def test_what_a_killed_build_left_is_removed(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(["one", "two"])
    (corpus,) = open_sources(config)
    left = tmp_path / "cache" / "datasets" / corpus.fingerprint / "local_text" / "incomplete.ABC_1.0.0"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    assert texts(corpus) == ["one", "two"]
    assert not left.exists()


def test_python_stdlib_is_its_own_source_without_tests(make_config: MakeConfig) -> None:
    (corpus,) = open_sources(make_config(source=("python_stdlib",)))
    assert corpus.name == "python_stdlib"
    found = texts(corpus)
    assert len(found) > 300
    assert Path(json.__file__).read_text() in found
    assert not [text for text in found if text.startswith('"""Tests for') or "import pytest\n" in text]
    # `ast` is one of the first files, `zipimport` one of the last: the order is that of the paths.
    assert 0 < found.index(Path(json.__file__).parents[1].joinpath("ast.py").read_text()) < len(found) / 2


def test_sources_may_be_several(make_config: MakeConfig, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    config = make_config(source=tuple(f"local_text:{tmp_path}/{name}" for name in ("a.txt", "b.txt")))
    assert [texts(corpus) for corpus in open_sources(config)] == [["a.txt"], ["b.txt"]]
    with pytest.raises(ConfigError, match=r"data\.source = '.*/c\.txt': does not exist"):
        open_sources(make_config(source=(f"local_text:{tmp_path}/c.txt",)))


def test_a_tfds_dataset_by_name(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (corpus,) = open_sources(make_config(source=("tfds:letter_texts",), text_field="letter"))
    assert texts(corpus) == ["aaa", "bbb", "ccc", "ééé"]
    (again,) = open_sources(make_config(source=("tfds:letter_texts:1.2.3",), text_field="letter"))
    assert again.fingerprint == corpus.fingerprint
    (other,) = open_sources(make_config(source=("tfds:letter_texts",)))
    with pytest.raises(ConfigError, match=r"data\.text_field = 'text': .*letter_texts has the fields label, letter"):
        texts(other)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "letter_text",
            r"data\.source = 'tfds:letter_text': TFDS has no dataset 'letter_text' \(did you mean letter_texts\?\)",
        ),
        ("wikipdia", r"did you mean wikipedia\?"),
        ("letter_texts/none", r"data\.source = 'tfds:letter_texts/none': .*"),
    ],
)
def test_unknown_tfds_names(make_config: MakeConfig, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_sources(make_config(source=(f"tfds:{name}",)))


@pytest.mark.parametrize("name", ["c4", "wikipedia/20230601.en", "wmt14_translate/de-en", "wiki40b", "lm1b"])
def test_tfds_datasets_that_must_be_imported_are_found(make_config: MakeConfig, name: str) -> None:
    (corpus,) = open_sources(make_config(source=(f"tfds:{name}",)))
    assert corpus.name == f"tfds:{name}"


@pytest.mark.parametrize("kind", ["saved", "files"])
def test_hugging_face_folders_need_no_network(
    make_config: MakeConfig, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder, values = tmp_path / "folder", ["first é", "", "third\r\n"]
    if kind == "saved":
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"body": values})}).save_to_disk(str(folder))
    else:
        folder.mkdir()
        (folder / "train.jsonl").write_text("".join(json.dumps({"body": value}) + "\n" for value in values))
    (corpus,) = open_sources(make_config(source=(f"hf:{folder}",), text_field="body"))
    assert texts(corpus) == values
    (again,) = open_sources(make_config(source=(f"hf:{folder}",), text_field="body"))
    assert again.fingerprint == corpus.fingerprint
    with pytest.raises(ConfigError, match=r"data\.text_field = 'text': example 0 of hf:.*folder has the fields body"):
        texts(open_sources(make_config(source=(f"hf:{folder}",)))[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.source = 'hf:.*empty'"):
        open_sources(make_config(source=(f"hf:{tmp_path}/empty",)))


def test_texts_that_are_not_utf8(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good\n\xff")
    with pytest.raises(ConfigError, match=r"bad\.txt is not UTF-8: byte 0xff at offset 5"):
        texts(open_sources(make_config(path=(str(tmp_path / "bad.txt"),)))[0])
    (corpus,) = open_sources(make_config(path=(str(tmp_path / "bad.txt"),), errors="replace"))
    assert texts(corpus) == ["good\n\ufffd"]


def test_a_corpus_without_documents(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"the corpus is empty: no document in .*corpus\.jsonl"):
        texts(open_sources(make_config([]))[0])


def test_preparing_imports_neither_tensorflow_nor_jax(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text to prepare\n" * 50)
    program = (
        "import sys\nfrom transformer.config import Config, replace\nfrom transformer.data.prepare import prepare\n"
        f"config = replace(Config(), data=dict(path=('{tmp_path}/text.txt',), cache_dir='{tmp_path}/cache', tokenizer='bytes'))\n"
        "assert prepare(config, show_progress=False).sources[0].train.num_tokens > 0\n"
        "assert 'tensorflow_datasets' in sys.modules\n"
        "print('LOADED', sorted({'tensorflow', 'jax', 'flax', 'grain', 'torch'} & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=120)
    assert done.stdout == "LOADED []\n", done.stdout + done.stderr

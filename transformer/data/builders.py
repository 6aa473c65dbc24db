"""TFDS builders of local text, and access to any other TFDS dataset; none of it imports TensorFlow."""

import contextlib
import importlib
import io
import pkgutil
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from transformer.config import ConfigError, nearest
from transformer.data import chats, files, forms
from transformer.data.forms import Form

TEXT_PACKAGES = ("text", "translate", "question_answering", "summarization", "text_simplification")
"""Parts of TFDS some of whose datasets are found only once their module is imported (c4, wikipedia, ...)."""


class LocalText(tfds.core.GeneratorBasedBuilder):
    """Documents of local files, in order; `data_dir` is named by the fingerprint of the files."""

    name = "local_text"
    VERSION = tfds.core.Version("1.0.0")
    url_infos: ClassVar = {}  # nothing is downloaded; TFDS would look for checksums beside this file

    def __init__(self, sources: Sequence[files.TextFile], form: Form, data_dir: Path):
        self.sources, self.form = sources, form
        super().__init__(file_format="array_record", data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _documents(self, file: files.TextFile) -> Iterator[str]:
        return forms.read_documents(file, self.form)

    def _all_documents(self) -> Iterator[str]:
        return (text for file in self.sources for text in self._documents(file))

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, str]]]:
        number = -1
        for number, text in enumerate(self._all_documents()):
            yield number, {"text": text}
        if number < 0:
            raise ConfigError(f"the corpus is empty: no document in {', '.join(str(f.path) for f in self.sources[:5])}")


class PythonStdlib(LocalText):
    """The source files of Python's standard library; the few that are not UTF-8 are left out."""

    name = "python_stdlib"

    def _documents(self, file: files.TextFile) -> Iterator[str]:
        """Yields the file, or conversations about what it documents."""
        if self.form.chat is None:
            with contextlib.suppress(ConfigError):
                yield from super()._documents(file)
            return
        with contextlib.suppress(UnicodeDecodeError), file.open() as stream:
            source = stream.read().decode()
            module = file.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for number, record in enumerate(chats.of_docstrings(source, module), start=1):
                yield self.form.document(record, f"{file.path}, docstring {number},")


class LocalPairs(LocalText):
    """The lines of two lists of local files, in order: those to read, and those to write."""

    name = "local_pairs"

    def __init__(
        self, sources: Sequence[files.TextFile], targets: Sequence[files.TextFile], form: Form, data_dir: Path
    ):
        self.targets = targets
        super().__init__(sources, form, data_dir)

    def _all_documents(self) -> Iterator[str]:
        return forms.read_pairs(self.sources, self.targets, self.form.errors)


def label_names(builder: tfds.core.DatasetBuilder, form: Form) -> tuple[str, ...]:
    """Returns what a dataset calls the labels that `form` asks for, in order of their numbers."""
    if form.kind != "labelled":
        return ()
    features, field = builder.info.features, form.fields[1][1]
    feature: Any = features[field] if isinstance(features, tfds.features.FeaturesDict) and field in features else None
    feature = getattr(feature, "feature", feature)  # of a list, that of its elements
    names = feature.names if isinstance(feature, tfds.features.ClassLabel) else ()
    return tuple(names or ())


def build(builder: tfds.core.DatasetBuilder, split: str = "") -> Any:
    """Returns the data source of a builder's split (its train split, or its first), which is made if it is missing."""
    root = Path(builder.data_dir)
    with files.locked(root.parent):
        if not root.exists():
            for killed in root.parent.glob("incomplete.*") if isinstance(builder, LocalText) else ():
                shutil.rmtree(killed)
            tfds.disable_progress_bar()
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    builder.download_and_prepare(file_format="array_record")
            except ImportError as error:
                raise ConfigError(f"TFDS cannot make {builder.name} without a package: {error}") from error
    # Reopened by directory, so that it can be sent to worker processes.
    splits: Any = tfds.builder_from_directory(root).as_data_source()
    if split and split not in splits:
        known = f"{', '.join(splits)}{nearest(split, tuple(splits))}"
        raise ConfigError(f"data.validation_split = {split!r}: {builder.name} has the splits {known}")
    return splits[split or ("train" if "train" in splits else next(iter(splits)))]


def named(name: str, data_dir: Path) -> tfds.core.DatasetBuilder:
    """Returns the builder of a TFDS dataset `NAME[/CONFIG][:VERSION]`. Raises ConfigError with the nearest name."""
    wanted = name.partition("/")[0].partition(":")[0]
    known = set(tfds.list_builders(with_community_datasets=False))
    for package in TEXT_PACKAGES:
        location = importlib.import_module(f"tensorflow_datasets.{package}").__path__
        modules = {module.name for module in pkgutil.iter_modules(location)}
        for module in modules if wanted not in known else ():
            if wanted.startswith(module):
                importlib.import_module(f"tensorflow_datasets.{package}.{module}")
        known |= modules
    try:
        return tfds.builder(name, data_dir=data_dir, file_format="array_record", try_gcs=False)
    except tfds.core.DatasetNotFoundError as error:
        hint = nearest(wanted, sorted(known))
        raise ConfigError(f"data.source = 'tfds:{name}': TFDS has no dataset {wanted!r}{hint}") from error
    except (ValueError, ImportError) as error:
        raise ConfigError(f"data.source = 'tfds:{name}': {error}") from error

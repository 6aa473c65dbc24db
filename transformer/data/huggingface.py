"""Datasets of Hugging Face `datasets` (extra `hf`): by name on the Hub, or a local folder, which needs no network."""

import errno
from pathlib import Path
from typing import Any

from transformer.config import ConfigError, nearest
from transformer.data.forms import Form


def label_names(records: Any, form: Form) -> tuple[str, ...]:
    """Returns what a dataset calls the labels that `form` asks for, in order of their numbers."""
    feature = records.features.get(form.fields[1][1]) if form.kind == "labelled" else None
    feature = getattr(feature, "feature", feature)  # of a list, that of its elements
    return tuple(getattr(feature, "names", None) or ())


def load(name: str, cache_dir: Path, split: str = "") -> tuple[str, Any]:
    """Returns a fingerprint and the records of `NAME[:CONFIG]` or of a folder: a split, or else its train or first one.

    A folder is one written by `save_to_disk`, or one of files that `load_dataset` understands. Raises ConfigError.
    """
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ConfigError(f"data.source = 'hf:{name}' needs the extra hf: pip install -e '.[hf]'") from error
    folder = Path(name).expanduser()
    path, _, config = (str(folder), "", "") if folder.exists() else name.partition(":")
    try:
        if any((folder / file).exists() for file in ("state.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(path)
        else:
            found = datasets.load_dataset(path, config or None, cache_dir=str(cache_dir / "huggingface"))
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        raise ConfigError(f"data.source = 'hf:{name}': {error}") from error
    if isinstance(found, datasets.DatasetDict):
        splits = [str(one) for one in found]
        if split and split not in splits:
            known = f"{', '.join(splits)}{nearest(split, splits)}"
            raise ConfigError(f"data.validation_split = {split!r}: {name} has the splits {known}")
        found = found[split or ("train" if "train" in splits else splits[0])]
    elif split:
        raise ConfigError(f"data.validation_split = {split!r}: hf:{name} is one split without a name")
    # `datasets` has no public name for the state of a table; this one follows its files and transformations.
    return found._fingerprint, found

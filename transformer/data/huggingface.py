"""Datasets of Hugging Face `datasets` (extra `hf`): by name on the Hub, or a local folder, which needs no network."""

import errno
from pathlib import Path
from typing import Any

from transformer.config import ConfigError


def load(name: str, cache_dir: Path) -> tuple[str, Any]:
    """Returns a fingerprint and the records of `NAME[:CONFIG]` or of a folder: its train split, or its first.

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
        found = found["train"] if "train" in found else next(iter(found.values()))
    # `datasets` has no public name for the state of a table; this one follows its files and transformations.
    return found._fingerprint, found

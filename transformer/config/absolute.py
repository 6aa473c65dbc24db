"""Names of files that hold from any directory, as a run keeps them."""

import glob
from pathlib import Path
from typing import Any

from transformer.config.init_from import InitFromConfig
from transformer.config.schema import DataConfig


def absolute(data: DataConfig) -> dict[str, Any]:
    """Returns the keys that name files, so that they name the same files from any directory."""

    def of(name: str) -> str:
        kind, colon, path = name.partition(":") if name.startswith(("local_text:", "hf:")) else ("", "", name)
        if kind == "hf":
            return f"hf:{Path(path).expanduser().absolute()}" if Path(path).expanduser().exists() else name
        return kind + colon + str(Path(glob.escape(str(Path.cwd()))) / Path(path).expanduser())

    source = tuple(name if name.startswith(("python_stdlib", "tfds:")) else of(name) for name in data.source)
    tokenizer = str(Path(data.tokenizer_path).expanduser().absolute()) if data.tokenizer_path else ""
    paths = (
        "path",
        "validation_path",
        "source_path",
        "target_path",
        "validation_source_path",
        "validation_target_path",
    )
    files = {name: tuple(map(of, getattr(data, name))) for name in paths}
    local = data.prepared and "://" not in data.prepared
    prepared = str(Path(data.prepared).expanduser().absolute()) if local else data.prepared
    found = {"source": source, "tokenizer_path": tokenizer, "prepared": prepared}
    template = Path(data.chat_template).expanduser() if data.chat_template and "{" not in data.chat_template else None
    # The text itself, so that the run needs no file.
    return files | found | ({"chat_template": template.read_text()} if template and template.is_file() else {})


def absolute_start(start: InitFromConfig) -> dict[str, Any]:
    """Returns the keys of `init_from`, those that name directories so that they do from anywhere."""

    def of(name: str) -> str:
        is_local = name and "://" not in name and Path(name).expanduser().exists()
        return str(Path(name).expanduser().absolute()) if is_local else name

    return vars(start) | {"run": of(start.run), "huggingface": of(start.huggingface)}

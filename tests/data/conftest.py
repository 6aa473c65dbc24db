"""Small corpora for the tests of the data."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from transformer.config import Config, replace

WORDS = "the quick brown fox jumps over lazy dogs while (self.x == 'y'):\n \t ünï ▁ 漢字 😀 \r\n\r\n        return None".split(
    " "
)


@pytest.fixture(scope="session")
def random_text() -> Callable[[int, int], str]:
    """Returns a function from a seed and a number of words to a text."""

    def text(seed: int, num_words: int) -> str:
        generator = random.Random(seed)
        return " ".join(generator.choice(WORDS) for _ in range(num_words))

    return text


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """Returns a function from documents and keys of `data` to a configuration with a cache of its own."""

    def make(documents: Sequence[str] | None = None, name: str = "corpus.jsonl", **data: Any) -> Config:
        if documents is not None:
            path = tmp_path / name
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
            data.setdefault("path", (str(path),))
        settings = {"cache_dir": str(tmp_path / "cache"), "num_workers": 1, "tokenizer": "bytes", "sequence_length": 16}
        settings["validation_documents"] = 0.2
        return replace(Config(), data=settings | data, train={"batch_size": 4})

    return make

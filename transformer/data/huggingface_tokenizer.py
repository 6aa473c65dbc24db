"""Hugging Face's `tokenizer.json` as a tokenizer (extra `hf`)."""

from pathlib import Path

import numpy as np

from transformer.config import ConfigError, write_atomically
from transformer.data.tokenizers import Ids, between, hash_of, save_config

# T5 begins what it writes with padding.
_ENDS = {
    "begin": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]", "<|endoftext|>", "<pad>"),
    "end": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]"),
}


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face (extra `hf`); its first and last tokens are known by their usual names."""

    def __init__(self, content: str, where: str = "tokenizer.json"):
        try:
            import tokenizers
        except ImportError as error:
            problem = "data.tokenizer = 'huggingface' needs the extra hf: pip install -e '.[hf]'"
            raise ConfigError(problem) from error
        self._content, self.fingerprint = content, hash_of("huggingface", content.encode())
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing narrower
            raise ConfigError(f"data.tokenizer_path = {where!r} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        ends = {what: [n for n in names if n in vocabulary] for what, names in _ENDS.items()}
        for what, names in ends.items():
            if not names:
                known = ", ".join(_ENDS[what])
                problem = f"has no token for the {what} of a document, none of {known}"
                raise ConfigError(f"data.tokenizer_path = {where!r} {problem}")
        self.bos, self.eos = (vocabulary[ends[what][0]] for what in ("begin", "end"))

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(between(0, ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer.json", self._content)
        save_config(directory, kind="huggingface")

    @classmethod
    def load(cls, directory: Path) -> "HuggingFaceTokenizer":
        return cls((directory / "tokenizer.json").read_text(), str(directory))

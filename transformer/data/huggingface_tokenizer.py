"""Hugging Face's `tokenizer.json` as a tokenizer (extra `hf`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from transformer.config import ConfigError, write_atomically
from transformer.data.tokenizers import Ids, between, hash_of, save_config

# T5 begins what it writes with padding.
_ENDS = {
    "begin": ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[CLS]", "<|endoftext|>", "<pad>"),
    "end": ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>", "<|im_end|>", "[SEP]"),
}


def _name(token: Any) -> str:
    """Returns a token's text; settings have it by itself, or with how it is looked for."""
    return (token["content"] if isinstance(token, dict) else token) or ""


class HuggingFaceTokenizer:
    """A `tokenizer.json` of Hugging Face (extra `hf`); its first and last tokens are known by their usual names, unless
    `settings`, those of the tokenizer_config.json beside it, name them. They may have a chat template too."""

    def __init__(self, content: str, where: str = "tokenizer.json", settings: dict[str, Any] | None = None):
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
        self.mask = next((vocabulary[name] for name in ("[MASK]", "<mask>") if name in vocabulary), None)
        self._settings = settings or {}
        keys = {"begin": "bos_token", "end": "eos_token"}
        given = {what: _name(self._settings.get(key)) for what, key in keys.items()}
        usual = {what: next((n for n in names if n in vocabulary), "") for what, names in _ENDS.items()}
        numbers = {what: self._settings.get(f"{key}_id", self.vocab_size) for what, key in keys.items()}
        by_number = {what: self._tokenizer.id_to_token(number) for what, number in numbers.items()}
        ends = {what: given[what] if given[what] in vocabulary else by_number[what] or usual[what] for what in usual}
        # Where no token begins a document, the one that ends the document before it does.
        ends["begin"] = ends["begin"] or ends["end"]
        if not ends["end"]:
            problem = f"has no token for the end of a document, none of {', '.join(_ENDS['end'])}"
            raise ConfigError(f"data.tokenizer_path = {where!r} {problem}")
        self.bos, self.eos = (vocabulary[ends[what]] for what in ("begin", "end"))
        self.more_ends = tuple(end for end in self._settings.get("more_ends", ()) if end < self.vocab_size)
        # What its settings leave out has no name in a chat template either.
        says = any(key in self._settings for key in keys.values())
        self.special_names = {key: (given if says else ends)[what] for what, key in keys.items()}
        self.chat_template = str(self._settings.get("chat_template") or "")
        if [*self.special_names.values(), *ends.values()] != 2 * list(usual.values()):
            self.fingerprint = hash_of("huggingface", f"{content}{self.special_names}{ends}".encode())

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids, and of each the place of its first character and of that after its last, [tokens, 2]."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Ids) -> str:
        return self._tokenizer.decode(between(0, ids, self.vocab_size).tolist(), skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        write_atomically(directory / "tokenizer.json", self._content)
        if self.chat_template:
            write_atomically(directory / "chat_template.jinja", self.chat_template)
        says: dict[str, Any] = {key: name for key, name in self.special_names.items() if key in self._settings}
        says |= {key: value for key, value in self._settings.items() if key.endswith("_id")}
        says |= {"more_ends": list(self.more_ends)} if self.more_ends else {}
        save_config(directory, kind="huggingface", **says)

    @classmethod
    def load(cls, directory: Path, **settings: Any) -> "HuggingFaceTokenizer":
        template = directory / "chat_template.jinja"
        settings |= {"chat_template": template.read_text()} if template.is_file() else {}
        return cls((directory / "tokenizer.json").read_text(), str(directory), settings)


def settings_in(folder: Path) -> dict[str, Any]:
    """Returns what stands beside a tokenizer.json about it: the names of its ends, or their numbers, and its chat template."""
    found = {
        key: value
        for name in ("special_tokens_map.json", "tokenizer_config.json")
        for key, value in _config_in(folder, name).items()
        if key in ("bos_token", "eos_token", "bos_token_id", "eos_token_id")
    }
    for key, value in found.items():
        value = value.get("content") if isinstance(value, dict) else value
        if not (value is None or isinstance(value, str) or (key.endswith("_id") and _is_token(value))):
            raise ConfigError(f"{folder}: {key} = {str(value)[:100]!r} is not a token")
    numbers = numbers_in(folder)
    found |= {f"{key}_id": numbers[key] for key in ("bos_token", "eos_token") if key in numbers and not found.get(key)}
    found |= {"more_ends": more} if (more := more_ends_in(folder)) else {}
    template = template_in(folder)
    return found | ({"chat_template": template} if template else {})


def numbers_in(folder: Path) -> dict[str, int]:
    """Returns the tokens that begin and end a text by the model's own configuration: a decoder that reads an encoder begins
    with one of its own."""
    found = _model_in(folder)
    if found.get("is_encoder_decoder") and found.get("decoder_start_token_id") is not None:
        found["bos_token_id"] = found["decoder_start_token_id"]
    numbers = {}
    for key in ("bos_token", "eos_token"):
        number = found.get(f"{key}_id")
        number = number[0] if isinstance(number, list) and number else number
        if _is_token(number):
            numbers[key] = number
    return numbers


def more_ends_in(folder: Path) -> list[int]:
    """Returns the tokens that end a text by the model's own configuration, where it lists several."""
    listed = _model_in(folder).get("eos_token_id")
    return [number for number in listed if _is_token(number)] if isinstance(listed, list) else []


def _is_token(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**31


def _model_in(folder: Path) -> dict[str, Any]:
    return _config_in(folder, "config.json") | _config_in(folder, "generation_config.json")


def template_in(folder: Path) -> str:
    """Returns the chat template beside a tokenizer, in chat_template.jinja or in its configuration; empty if there is none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    found = _config_in(folder, "tokenizer_config.json").get("chat_template") or ""
    if isinstance(found, list):  # several, by name
        found = {item["name"]: item["template"] for item in found}.get("default", "")
    return found


def _config_in(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return found

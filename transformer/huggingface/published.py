"""The tokenizer of a published model, in; of a run, out, as files that transformers loads without code of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformer.config import ConfigError, ModelConfig
from transformer.data.new_tokenizer import read_tokenizer
from transformer.data.tokenizers import BOS, EOS, NUM_SPECIAL, PAD, UNK, Tokenizer
from transformer.huggingface.folder import Folder
from transformer.huggingface.header import read_json

PUBLISHED = "published"
"""Folder in a run's tokenizer/ with the files of a published model that say more than its tokens; they come out again."""

KEPT = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer.model",
        "spiece.model",
        "vocab.json",
        "merges.txt",
        "vocab.txt",
    ),
)
LARGEST = 2**28
"""Bytes of the largest file of a tokenizer."""

KINDS = {"tokenizer.json": "huggingface", "tokenizer.model": "bpe", "spiece.model": "bpe"}
"""Files of a tokenizer, the first that is there is used, and the `data.tokenizer` that reads them."""

SPECIAL = {PAD: "<pad>", BOS: "<s>", EOS: "</s>", UNK: "<unk>"}
SAMPLES = ("Hello, world!  Two  spaces\n\ttab", "def f(x):\n    return x  # fünf €", "日本語 🙂 ", "\n", " a")
"""What a tokenizer that is written anew must read as the run's own does."""


def tokenizer_of(folder: Folder, model: ModelConfig) -> tuple[Tokenizer, str, dict[str, bytes]]:
    """Returns a folder's tokenizer, the `data.tokenizer` that it is, and the files to keep with it."""
    name = next((name for name in KINDS if folder.has(name)), None)
    if name is None:
        advice = "save it once by transformers' AutoTokenizer, which writes a tokenizer.json"
        raise ConfigError(f"{folder.path} has none of {', '.join(KINDS)}: {advice}")
    kept = {}
    for file in (name, *KEPT):
        if folder.has(file):
            path = folder.file(file)
            if not path.is_file() or path.stat().st_size > LARGEST:
                raise ConfigError(f"{path} is no file of at most {LARGEST:,} bytes")
            kept[file] = path.read_bytes()
    for file in kept:
        if file.endswith(".json") and file != name and not isinstance(folder.json(file), dict | list):
            raise ConfigError(f"{folder.path / file} is not an object")
    tokenizer = read_tokenizer(KINDS[name], str(folder.path / name))
    if tokenizer.vocab_size > (model.vocab_size or 0):
        rows = f"model's embedding has {model.vocab_size:,} rows"
        raise ConfigError(
            f"{folder.path / name} has {tokenizer.vocab_size:,} tokens, and the {rows}: one of them is of another model"
        )
    return (
        tokenizer,
        KINDS[name],
        {file: content for file, content in kept.items() if file != name or file == "tokenizer.model"},
    )


def special_ids(tokenizer: Tokenizer, saved: Path) -> dict[str, Any]:
    """Returns what config.json and generation_config.json say of special tokens: what was published, or the run's own."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    if (saved / PUBLISHED / "config.json").is_file():
        published = read_json(saved / PUBLISHED / "config.json")
        return {key: published[key] for key in keys if published.get(key) is not None}
    found = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    return found | ({"pad_token_id": PAD} if _is_ours(tokenizer) else {})


def _is_ours(tokenizer: Tokenizer) -> bool:
    """Returns whether the special tokens are those of every tokenizer that we make."""
    return (tokenizer.bos, tokenizer.eos) == (BOS, EOS)


def write_tokenizer(saved: Path, tokenizer: Tokenizer, target: Path) -> str:
    """Writes the tokenizer saved in a run to the folder `target`; returns why it could not, or nothing."""
    published = saved / PUBLISHED
    if published.is_dir():
        for path in published.iterdir():
            if path.name not in ("config.json", "generation_config.json"):
                (target / path.name).write_bytes(path.read_bytes())
        if (saved / "tokenizer.json").is_file():
            (target / "tokenizer.json").write_bytes((saved / "tokenizer.json").read_bytes())
        return ""
    if (saved / "tokenizer.json").is_file():
        content, names = (saved / "tokenizer.json").read_text(), _names(tokenizer, saved)
    else:
        try:
            made, problem = _made(saved, tokenizer)
        except ImportError:
            made, problem = None, "it takes the package tokenizers (extra hf) to write one"
        if made is None:
            return problem
        content, names = (
            made.to_str(),
            {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        )
    (target / "tokenizer.json").write_text(content)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    if (saved / "chat_template.jinja").is_file():
        (target / "chat_template.jinja").write_bytes((saved / "chat_template.jinja").read_bytes())
    return ""


def _names(tokenizer: Tokenizer, saved: Path) -> dict[str, str]:
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    return {f"{end}_token": library.id_to_token(getattr(tokenizer, end)) for end in ("bos", "eos")}


def _made(saved: Path, tokenizer: Tokenizer) -> tuple[Any, str]:
    """Returns a tokenizer of the library `tokenizers` that does what ours does, or why there is none."""
    kind = json.loads((saved / "tokenizer_config.json").read_text())["kind"]
    if not _is_ours(tokenizer):
        return None, f"its special tokens are not those of a tokenizer that was trained here ({kind})"
    make = {"bytes": _of_bytes, "characters": _of_characters, "sentencepiece": _of_sentencepiece}[kind]
    made = make(saved)
    made.add_special_tokens(list(SPECIAL.values()))
    for text in SAMPLES:
        ids = made.encode(text, add_special_tokens=False).ids
        if ids != tokenizer.encode(text).tolist():
            return None, f"the library tokenizers reads {text!r} as other tokens than the run's {kind} tokenizer"
    return made, ""


def _vocabulary(pieces: Mapping[str, int]) -> dict[str, int]:
    return {name: number for number, name in SPECIAL.items()} | dict(pieces)


def _of_bytes(saved: Path) -> Any:
    """A BPE without merges, on bytes that the library spells as letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = _vocabulary({letter: byte + NUM_SPECIAL for byte, letter in letters.items()})
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _of_characters(saved: Path) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = json.loads((saved / "tokenizer_config.json").read_text())["characters"]
    vocabulary = _vocabulary({letter: NUM_SPECIAL + i for i, letter in enumerate(characters)})
    made = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL[UNK]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def _of_sentencepiece(saved: Path) -> Any:
    """The merges of a BPE model are not in its file: they are the pairs of pieces that make a piece, the best first."""
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers

    model = sentencepiece.SentencePieceProcessor(model_file=str(saved / "tokenizer.model"))
    pieces = [SPECIAL.get(i, model.id_to_piece(i)) for i in range(model.vocab_size())]
    scores = [model.get_score(i) for i in range(model.vocab_size())]
    is_text = [not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i)) for i in range(len(pieces))]
    if _is_bpe(scores):
        number = {piece: i for i, piece in enumerate(pieces)}
        merges = []
        for i, piece in enumerate(pieces):
            if is_text[i]:
                pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
                own = [pair for pair in pairs if all(part in number and is_text[number[part]] for part in pair)]
                merges += sorted(((-scores[i], number[a], number[b], a, b) for a, b in own))
        merges = [(a, b) for *_, a, b in sorted(merges)]
        made = Tokenizer(models.BPE(number, merges, unk_token=SPECIAL[UNK], fuse_unk=True, byte_fallback=True))
    else:
        made = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=UNK, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def _is_bpe(scores: list[float]) -> bool:
    """Returns whether scores are those of a BPE model: numbers in the order of the merges, not log-probabilities."""
    return all(float(score).is_integer() for score in scores)

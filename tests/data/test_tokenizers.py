"""Every tokenizer gives back the text it was given."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transformer.config import ConfigError
from transformer.data import sentencepiece_tokenizer
from transformer.data.huggingface_tokenizer import HuggingFaceTokenizer
from transformer.data.new_tokenizer import read_tokenizer, train_sentencepiece
from transformer.data.plain_tokenizers import ByteTokenizer, CharacterTokenizer
from transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transformer.data.tokenizers import BOS, EOS, PAD, UNK, Tokenizer, load_tokenizer

HARD = [
    "",
    " ",
    "   leading, trailing   ",
    "\t\ttabs\n\n\n\r\nCRLF\r\n\rCR",
    "def f(x):\n        if x:\n\t        return  x\n",
    "▁ literal lower one eighth block ▁▁ and ▂",
    "\x00 nul \x7f \x1b \ufeff \u2028 \ufffd \U0010ffff \ue000",
    "<s></s><unk><pad><0x0A>&lt; ⁇ ",
    "e\u0301 é ﬁ Ａ ① İ ß",  # normalisation would change each
    "😀👩‍👩‍👧‍👦 漢字 ไทย العربية",
    "x" * 5000,
    " " * 1000 + "\n" * 1000,
]


def random_unicode(seed: int) -> str:
    generator = random.Random(seed)
    ranges = [(32, 127), (0, 32), (128, 0x2FF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF), (0x2580, 0x2585)]
    return "".join(chr(generator.randint(*generator.choice(ranges))) for _ in range(200))


@pytest.fixture(scope="module", params=["bytes", "characters", "bpe", "unigram", "huggingface"])
def tokenizer(request: pytest.FixtureRequest, random_text: Callable[[int, int], str]) -> Tokenizer:
    texts = [random_text(seed, 300) for seed in range(20)]
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "characters":
        return CharacterTokenizer("".join(HARD + [random_unicode(seed) for seed in range(50)]))
    if request.param == "huggingface":
        return HuggingFaceTokenizer(hugging_face_json(texts))
    return train_sentencepiece(texts, request.param, 310)


def hugging_face_json(texts: list[str], special: tuple[str, ...] = ("<|endoftext|>",)) -> str:
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(library.models.BPE())
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    model.enable_truncation(7)
    return model.to_str()


def test_a_tokenizer_of_bert_puts_cls_and_sep_around_a_text(tmp_path: Path) -> None:
    """They are its own marks, which its post-processor is not asked for: an encoder's texts and ours are the same."""
    library = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "##s", "he", "cafe", "!"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = library.Tokenizer(library.models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    model.decoder = library.decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    model.post_processor = library.processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    model.add_special_tokens(words[:5])
    tokenizer = HuggingFaceTokenizer(model.to_str())
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (2, 3, 11)
    ids = tokenizer.encode("He plays, playing! Café")
    assert ids.tolist() == [8, 5, 7, 1, 5, 6, 10, 9]
    assert [2, *ids.tolist(), 3] == model.encode("He plays, playing! Café").ids
    assert tokenizer.decode([2, 8, 5, 7, 3]) == "he plays"
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode("plays").tolist() == [5, 7]


def test_a_tokenizer_of_t5_begins_a_text_with_padding() -> None:
    tokenizer = HuggingFaceTokenizer(hugging_face_json(["a b c"], special=("<pad>", "</s>", "<unk>")))
    assert (tokenizer.bos, tokenizer.eos) == (0, 1)


def test_decoding_inverts_encoding(tokenizer: Tokenizer) -> None:
    for text in HARD + [random_unicode(seed) for seed in range(50)]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert not len(ids) or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)
        assert tokenizer.decode(ids.tolist()) == text
        assert tokenizer.decode(ids) == text


def test_special_tokens_stay_out_of_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<s></s> the quick").tolist()
    assert not {tokenizer.bos, tokenizer.eos} & set(ids)
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == "a<s></s> the quick"
    assert tokenizer.decode([]) == ""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        assert (tokenizer.bos, tokenizer.eos) == (BOS, EOS)
        assert tokenizer.decode([PAD, BOS, EOS]) == ""


def test_saving_keeps_ids_and_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert type(loaded) is type(tokenizer)
    assert (loaded.vocab_size, loaded.bos, loaded.eos) == (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos)
    assert loaded.fingerprint == tokenizer.fingerprint
    for text in HARD:
        assert loaded.encode(text).tolist() == tokenizer.encode(text).tolist()


def test_incomplete_bytes_decode_to_the_replacement_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("漢")
    if len(ids) > 1:
        assert "\ufffd" in tokenizer.decode(ids[:1].tolist())


def test_known_ids() -> None:
    assert ByteTokenizer().encode("A\xe9").tolist() == [69, 199, 173]
    characters = CharacterTokenizer("hello")
    assert characters.vocab_size == 8
    assert characters.encode("hello!").tolist() == [5, 4, 6, 6, 7, UNK]
    assert characters.decode([5, 4, UNK, 6]) == "hel"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_merges_indentation(kind: str) -> None:
    texts = [f"class A{i}:\n    def f(self):\n        return {i}\n" for i in range(200)]
    first, second = (train_sentencepiece(iter(texts), kind, 310) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 310
    assert len(first.encode("        ")) <= 2
    assert train_sentencepiece([*texts[:-1], "zebra zebra"], kind, 310).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_vocabularies_that_the_corpus_does_not_support(kind: str) -> None:
    texts = ["hello world, hello there\n"] * 50
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer_vocab_size = 4096: .* can have at most \d{3} tokens"
    ) as caught:
        train_sentencepiece(texts, kind, 4096)
    most = int(str(caught.value).split()[-2])
    assert train_sentencepiece(texts, kind, most).vocab_size == most
    with pytest.raises(ConfigError, match=r"data\.tokenizer_vocab_size = 100: .* can have at least \d{3}"):
        train_sentencepiece(texts, kind, 100)


def test_long_texts_are_encoded_in_pieces(
    monkeypatch: pytest.MonkeyPatch, random_text: Callable[[int, int], str]
) -> None:
    tokenizer = train_sentencepiece([random_text(seed, 300) for seed in range(5)], "bpe", 330)
    text = random_text(9, 1000)
    monkeypatch.setattr(sentencepiece_tokenizer, "_ENCODE_CHARACTERS", 100)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_files_that_are_no_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"junk \xff")
    for kind, message in (("bpe", "is not a SentencePiece model"), ("huggingface", "is not a tokenizer.json")):
        with pytest.raises(ConfigError, match=rf"data\.tokenizer_path = '{tmp_path}/bad' {message}"):
            read_tokenizer(kind, str(tmp_path / "bad"))
        with pytest.raises(ConfigError, match=r"data\.tokenizer_path = .* does not exist"):
            read_tokenizer(kind, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"no token for the end of a document, none of </s>"):
        HuggingFaceTokenizer(hugging_face_json(["a b c"], special=("<bos>",)))


def test_given_files_and_directories_are_read(tmp_path: Path, random_text: Callable[[int, int], str]) -> None:
    trained = train_sentencepiece([random_text(1, 500)], "bpe", 330)
    trained.save(tmp_path)
    for path in (tmp_path / "tokenizer.model", tmp_path):
        found = read_tokenizer("bpe", str(path))
        assert isinstance(found, SentencePieceTokenizer)
        assert found.fingerprint == trained.fingerprint


def test_several_ends_of_a_published_model_are_kept(tmp_path: Path, random_text: Callable[[int, int], str]) -> None:
    """The first ends documents; any ends what is written. What is no token of this tokenizer is none of them."""
    folder, saved = tmp_path / "published", tmp_path / "saved"
    folder.mkdir()
    train_sentencepiece([random_text(1, 500)], "bpe", 330).save(folder)
    (folder / "config.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9, 330, "x", -1]}')
    read_tokenizer("bpe", str(folder / "tokenizer.model")).save(saved)
    for found in (read_tokenizer("bpe", str(folder / "tokenizer.model")), load_tokenizer(saved)):
        assert (found.eos, found.more_ends) == (5, (5, 9))

"""Preparing: what lies in the shards, how documents are divided, and that nothing but the input decides a byte."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from preparing import contents, finish, kill_twice, start

from transformer.config import Config, ConfigError, replace
from transformer.data import prepare as preparing
from transformer.data.division import split_texts
from transformer.data.plain_tokenizers import CharacterTokenizer
from transformer.data.prepare import prepare
from transformer.data.prepared import prepare_apart
from transformer.data.sentencepiece_tokenizer import SentencePieceTokenizer
from transformer.data.shards import Split
from transformer.data.tokenizers import BOS, EOS, NUM_SPECIAL

MakeConfig = Callable[..., Config]
RandomText = Callable[[int, int], str]


def streams(split: Split) -> list[tuple[np.ndarray, np.ndarray]]:
    """All inputs and all targets that count, as pairs in order, of each shard."""
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in split.shards]
    for number in range(split.num_windows):
        window = split.window(number)
        shard = int(np.searchsorted(split.first_windows, number, side="right")) - 1
        counts = window["weights"] > 0
        found[shard][0].extend(window["inputs"][counts])
        found[shard][1].extend(window["targets"][counts])
    return [(np.array(inputs), np.array(targets)) for inputs, targets in found]


def pieces(split: object) -> list[list[int]]:
    """The ids of each document, from the windows' tokens."""
    assert isinstance(split, Split)
    found: list[list[int]] = []
    for inputs, targets in streams(split):
        for first, second in zip(inputs.tolist(), targets.tolist(), strict=True):
            if first == BOS:
                found.append([BOS])
            found[-1].append(second)
    return found


DOCUMENTS = ["", "a", "bc", "x" * 100, "é漢😀", "line\r\n\tline", "", "y" * 16, "z" * 15, "w" * 14, *"abcdefgh"]


@pytest.mark.parametrize("shard_bytes", [1, 20, 2**20])
@pytest.mark.parametrize("length", [1, 2, 7, 16, 1000])
def test_windows_hold_every_document_once(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, length: int
) -> None:
    monkeypatch.setattr(preparing, "SHARD_BYTES", shard_bytes)
    prepared = prepare(make_config(DOCUMENTS, sequence_length=length, validation_documents=0.4), False)
    (source,) = prepared.sources
    found = []
    for split in (source.train, source.validation):
        documents = pieces(split)
        assert all(document[-1] == EOS and document.count(BOS) == document.count(EOS) == 1 for document in documents)
        assert split.num_tokens == sum(len(document) - 1 for document in documents)
        texts = [prepared.tokenizer.decode(document) for document in documents]
        assert split.num_bytes == sum(len(text.encode()) for text in texts)
        found += texts
    assert sorted(found) == sorted(text for text in DOCUMENTS if text)


def test_windows_overlap_by_one_token_and_know_their_documents(make_config: MakeConfig) -> None:
    config = make_config(["abcdefg", "hi", "jklm"], sequence_length=4, validation_documents=0.0, validation_tail=0.001)
    split = prepare(config, False).sources[0].train
    # The tail takes the last character of each document: b abcdef | b h | b jkl
    windows = [split.window(number) for number in range(split.num_windows)]
    letter = {name: ord(name) + NUM_SPECIAL for name in "abcdefghijklm"} | {"^": BOS}

    def ids(text: str) -> list[int]:
        return [letter[character] for character in text]

    assert [w["inputs"].tolist() for w in windows] == [ids("^abc"), ids("def^"), ids("h^jk")]
    assert [w["targets"].tolist() for w in windows] == [ids("abcd"), ids("ef^h"), ids("^jkl")]
    assert [w["weights"].tolist() for w in windows] == [[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]]
    assert [w["segment_ids"].tolist() for w in windows] == [[1, 1, 1, 1], [1, 1, 1, 2], [1, 2, 2, 2]]
    assert [w["positions"].tolist() for w in windows] == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 0, 1, 2]]


@pytest.mark.parametrize("length", [1, 3, 16, 64])
def test_every_epoch_of_shifted_cuts_has_every_target_once(
    make_config: MakeConfig, random_text: RandomText, length: int
) -> None:
    split = prepare(make_config([random_text(i, 9) for i in range(30)], sequence_length=length), False).sources[0].train

    def pairs(epoch: int) -> list[tuple[int, ...]]:
        found = []
        for number in range(split.num_windows):
            window = split.window(number, 5, epoch)
            assert len(window["inputs"]) <= length
            counts = window["weights"] > 0
            found += zip(window["inputs"][counts].tolist(), window["targets"][counts].tolist(), strict=True)
        return sorted(found)

    assert len(pairs(0)) == split.num_tokens
    assert all(pairs(epoch) == pairs(0) for epoch in range(1, 6))
    if length > 1:
        firsts = {split.window(0, 5, epoch)["inputs"].tobytes() for epoch in range(20)}
        assert len(firsts) > 1, "the cuts never move"
        others = {split.window(0, seed, 1)["inputs"].tobytes() for seed in range(20)}
        assert len(others) > 1, "the seed does not matter"


def test_segments_join_no_two_documents_where_the_ring_closes(make_config: MakeConfig) -> None:
    split = prepare(make_config(["abcdefghij" * 5], sequence_length=8), False).sources[0].train
    closing = 0
    for number in range(split.num_windows):
        for epoch in range(1, 9):
            window = split.window(number, 0, epoch)
            starts = np.flatnonzero(window["inputs"] == BOS)
            for begin in starts[starts > 0]:
                closing += 1
                assert window["positions"][begin] == 0
                assert window["segment_ids"][begin] == window["segment_ids"][begin - 1] + 1
                # The head's last input has its true successor as target, though the next input is the first token.
                assert window["weights"][begin - 1] == 1 and window["targets"][begin - 1] != BOS
    assert closing


def test_division_by_hash_moves_no_document(make_config: MakeConfig, random_text: RandomText) -> None:
    documents = [random_text(seed, 20) for seed in range(300)]
    few, more = (make_config(documents[:n], f"{n}.jsonl") for n in (200, 300))
    few_held, more_held = (set(split_texts(config, "validation")) for config in (few, more))
    assert few_held == more_held & set(documents[:200])
    assert set(split_texts(few, "train")) == set(documents[:200]) - few_held
    # Binomial: 300 at 0.2 has a standard deviation of 7.
    assert 60 - 5 * 7 < len(more_held) < 60 + 5 * 7
    larger = set(split_texts(replace(few, data={"validation_documents": 0.5}), "validation"))
    assert few_held < larger
    assert list(split_texts(few, "validation")) == [text for text in documents[:200] if text in few_held]


@pytest.mark.parametrize("num_characters", [2, 10, 999, 1003, 12345])
def test_a_single_document_is_cut_like_nanogpt_does(make_config: MakeConfig, num_characters: int) -> None:
    text = ("é漢\r\n" * num_characters)[:num_characters]
    config = make_config([text])
    end = int(num_characters * 0.9)
    assert (list(split_texts(config, "train")), list(split_texts(config, "validation"))) == ([text[:end]], [text[end:]])
    prepared = prepare(config, False)
    head, tail = (pieces(split) for split in (prepared.sources[0].train, prepared.sources[0].validation))
    assert head == [[BOS, *prepared.tokenizer.encode(text[:end])]]
    assert tail == [[BOS, *prepared.tokenizer.encode(text[end:]), EOS]]
    assert prepared.sources[0].validation.num_bytes == len(text[end:].encode())


def test_tails_of_several_documents(make_config: MakeConfig) -> None:
    config = make_config(["abcdefghij", "k", "lmno"], validation_tail=0.3)
    assert list(split_texts(config, "train")) == ["abcdefg", "lm"]
    assert list(split_texts(config, "validation")) == ["hij", "k", "no"]


def test_splits_without_text_are_refused(make_config: MakeConfig) -> None:
    for share, which in ((0.0, "none"), (0.999, "all")):
        problem = rf"data\.validation_documents = {share}: {which} of the 8 documents .* data\.validation_tail = 0\.1"
        with pytest.raises(ConfigError, match=problem):
            prepare(make_config(list("abcdefgh"), validation_documents=share), False)
    with pytest.raises(ConfigError, match=r"the train split of local_text has no text: change data\.validation_tail"):
        prepare(make_config(["a"]), False)
    with pytest.raises(ConfigError, match="the corpus is empty: no document of local_text has text"):
        prepare(make_config(["", ""]), False)


def test_training_text_alone_makes_the_tokenizer_characters_excepted(make_config: MakeConfig) -> None:
    text = "ab " * 300 + "Z" * 100
    characters = prepare(make_config([text], tokenizer="characters"), False).tokenizer
    assert isinstance(characters, CharacterTokenizer) and characters.characters == " Zab"
    words = prepare(make_config([text], tokenizer="bpe", tokenizer_vocab_size=264), False).tokenizer
    assert isinstance(words, SentencePieceTokenizer) and len(words.encode("ZZZZ")) == 4 and len(words.encode("ab")) == 1


def test_vocabulary_that_the_corpus_does_not_support(make_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer_vocab_size = 4096: the corpus does not support it"):
        prepare(make_config(["some text, not much"] * 3, tokenizer="bpe", validation_tail=0.1), False)


def test_large_vocabularies_are_stored_in_32_bits(make_config: MakeConfig) -> None:
    alphabet = "".join(map(chr, [*range(0x4E00, 0x9FFF), *range(0xAC00, 0xD7A3), *range(0x20000, 0x29000)]))
    prepared = prepare(make_config([alphabet], tokenizer="characters"), False)
    assert prepared.tokenizer.vocab_size > 2**16
    (ids,) = pieces(prepared.sources[0].validation)
    assert max(ids) >= 2**16
    assert prepared.tokenizer.decode(ids) == alphabet[int(len(alphabet) * 0.9) :]


def test_what_decides_the_shards_decides_the_fingerprint(make_config: MakeConfig, random_text: RandomText) -> None:
    documents = [random_text(seed, 20) for seed in range(30)]
    config = make_config(documents)
    first = prepare(config, False)
    written = contents(Path(first.sources[0].train.directory.parent))
    assert prepare(config, False).fingerprint == first.fingerprint
    assert contents(Path(first.sources[0].train.directory.parent)) == written
    found = {first.fingerprint}
    for changes in (
        {"sequence_length": 17},
        {"tokenizer": "characters"},
        {"validation_tail": 0.2},
        {"validation_documents": 0.3},
    ):
        found.add(prepare(replace(config, data=changes), False).fingerprint)
    found.add(prepare(make_config([*documents, "one more"]), False).fingerprint)
    assert len(found) == 6
    for same in ({"shuffle": False}, {"num_workers": 2}, {"prefetch_batches": 1}):
        assert prepare(replace(make_config(documents), data=same), False).fingerprint == first.fingerprint


def test_sources_share_a_tokenizer_and_keep_their_shards(make_config: MakeConfig, tmp_path: Path) -> None:
    for name, text in (("a", "abc " * 100), ("b", "xyz " * 200)):
        (tmp_path / f"{name}.txt").write_text(text)
    sources = tuple(f"local_text:{tmp_path}/{name}.txt" for name in "ab")
    prepared = prepare(make_config(source=sources, tokenizer="characters"), False)
    first, second = prepared.sources
    assert isinstance(prepared.tokenizer, CharacterTokenizer) and prepared.tokenizer.characters == " abcxyz"
    assert (first.train.num_bytes, second.train.num_bytes) == (360, 720)
    assert first.train.directory != second.train.directory


# The work of processes: killed, several, at once.


@pytest.fixture(scope="module")
def many_documents(random_text: RandomText) -> list[str]:
    return [random_text(seed, 40) for seed in range(400)]


@pytest.fixture(scope="module")
def never_killed(many_documents: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    directory = tmp_path_factory.mktemp("never_killed")
    (directory / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in many_documents))
    settings = {"path": (str(directory / "corpus.jsonl"),), "cache_dir": str(directory / "cache"), "num_workers": 1}
    config = replace(Config(), data=settings | {"tokenizer_vocab_size": 330, "sequence_length": 64})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "SHARD_BYTES", 1000)
        prepare(config, False)
    return contents(directory / "cache")


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_twice_gives_the_same_bytes(
    make_config: MakeConfig, many_documents: list[str], never_killed: dict[str, bytes], tmp_path: Path, num_workers: int
) -> None:
    config = make_config(
        many_documents,
        num_workers=num_workers,
        tokenizer="bpe",
        tokenizer_vocab_size=330,
        sequence_length=64,
        validation_documents=0.02,
    )
    num_shards = sum(name.endswith("array_record") for name in never_killed)
    assert num_shards > 40
    shards = kill_twice(config, tmp_path, num_shards, seed=num_workers)
    finish(start(config, tmp_path))
    assert contents(tmp_path / "cache") == never_killed
    assert {path: path.stat().st_mtime_ns for path in shards} == shards, "finished shards were written again"


def test_two_processes_prepare_at_once(
    make_config: MakeConfig, many_documents: list[str], never_killed: dict[str, bytes], tmp_path: Path
) -> None:
    config = make_config(
        many_documents, tokenizer="bpe", tokenizer_vocab_size=330, sequence_length=64, validation_documents=0.02
    )
    both = [start(config, tmp_path), start(config, tmp_path)]
    outputs = [finish(process) for process in both]
    assert contents(tmp_path / "cache") == never_killed
    assert sum("training a tokenizer" in output for output in outputs) == 1
    assert any("waiting for another process that prepares" in output for output in outputs)


def test_a_process_of_its_own_prepares_the_same_and_tells_the_same_mistakes(
    make_config: MakeConfig, random_text: RandomText
) -> None:
    config = make_config([random_text(seed, 20) for seed in range(30)])
    apart = prepare_apart(config, False)
    here = prepare(config, False)
    assert (apart.fingerprint, apart.sources) == (here.fingerprint, here.sources)
    assert apart.tokenizer.fingerprint == here.tokenizer.fingerprint
    with pytest.raises(ConfigError, match=r"data\.path = '/nowhere': does not exist"):
        prepare_apart(replace(config, data={"path": ("/nowhere",)}), False)
    # A file where a directory has to be is an OSError, with its number, here as there.
    file = Path(config.data.cache_dir) / "a_file"
    file.write_text("")
    with pytest.raises(NotADirectoryError):
        prepare_apart(replace(config, data={"cache_dir": str(file / "below")}), False)

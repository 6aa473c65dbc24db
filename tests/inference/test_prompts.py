"""How prompts become batches."""

import gzip
from typing import Any

import numpy as np
import pytest

from transformer.config import Config, ConfigError, ModelConfig, replace
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.data.tokenizers import BOS, EOS
from transformer.inference.prompts import (
    batches_by_length,
    bucket,
    check_prompts,
    encode_prompts,
    max_new_tokens,
    read_prompts,
)
from transformer.models.transformer import Transformer
from transformer.objectives import objective_of

TOKENIZER = ByteTokenizer()


def model_of(**changes: Any) -> Transformer:
    return Transformer(ModelConfig(**{"vocab_size": 260, "num_layers": 1, "width": 8, "scan_layers": False} | changes))


def columns(batch: dict[str, np.ndarray], row: int, name: str = "") -> list[tuple[int, int]]:
    """Tokens and positions of a row that are not padding."""
    is_token = batch[f"{name}segment_ids"][row] == 1
    assert not np.any(batch[f"{name}inputs"][row][~is_token])
    return list(zip(batch[f"{name}inputs"][row][is_token], batch[f"{name}positions"][row][is_token], strict=True))


@pytest.mark.parametrize("prefix", [False, True])
def test_a_decoders_prompts_end_side_by_side(prefix: bool) -> None:
    prompts = encode_prompts(model_of(), TOKENIZER, ["ab", "", "x" * 40], prefix=prefix)
    assert prompts.width == 64 and "encoder_inputs" not in prompts.batch
    assert columns(prompts.batch, 0) == [(BOS, 0), (ord("a") + 4, 1), (ord("b") + 4, 2)]
    assert columns(prompts.batch, 1) == [(BOS, 0)]
    assert np.all(prompts.batch["segment_ids"][:, -1] == 1)
    assert [begin.tolist() for begin in prompts.begins[:2]] == [[BOS, 101, 102], [BOS]]
    assert ("prefix" in prompts.batch) == prefix
    if prefix:
        np.testing.assert_array_equal(prompts.batch["prefix"], prompts.batch["segment_ids"] == 1)


def test_an_encoder_reads_its_prompts_from_the_first_column_to_their_end() -> None:
    prompts = encode_prompts(model_of(architecture="encoder_decoder"), TOKENIZER, ["ab", ""])
    assert (prompts.width, prompts.batch["encoder_inputs"].shape[1]) == (1, 32)
    assert columns(prompts.batch, 0, "encoder_") == [(ord("a") + 4, 0), (ord("b") + 4, 1), (EOS, 2)]
    assert columns(prompts.batch, 1, "encoder_") == [(EOS, 0)]
    assert np.all(prompts.batch["encoder_segment_ids"][:, 0] == 1)
    assert columns(prompts.batch, 0) == columns(prompts.batch, 1) == [(BOS, 0)]
    begun = encode_prompts(model_of(architecture="encoder_decoder"), TOKENIZER, ["ab", ""], begin="c")
    assert columns(begun.batch, 0) == columns(begun.batch, 1) == [(BOS, 0), (ord("c") + 4, 1)]
    with pytest.raises(ConfigError, match="only an encoder-decoder begins its texts apart"):
        check_prompts(model_of(), TOKENIZER, ["ab"], 5, "c")


def test_a_middle_is_asked_for_as_in_training() -> None:
    """And the text that the middle continues is what stands before the gap."""
    prompts = encode_prompts(model_of(vocab_size=263), TOKENIZER, ["ab__c", "__"], gap="__")
    prefix, suffix, middle = 260, 261, 262
    tokens = [token for token, _ in columns(prompts.batch, 0)]
    assert tokens == [BOS, prefix, ord("a") + 4, ord("b") + 4, suffix, ord("c") + 4, middle]
    assert [token for token, _ in columns(prompts.batch, 1)] == [BOS, prefix, suffix, middle]
    assert [begin.tolist() for begin in prompts.begins] == [[BOS, 101, 102], [BOS]]
    config = replace(Config(), objective={"name": "fill_in_the_middle", "middle_rate": 1.0, "suffix_first_rate": 0.0})
    ids = np.array([BOS, *TOKENIZER.encode("abc"), EOS], np.int32)
    rows = {"inputs": ids, "targets": ids, "segment_ids": np.ones(5, int), "weights": np.array([1.0] * 4 + [0.0])}
    made = [objective_of(config).example(config, TOKENIZER, rows, np.random.default_rng(s)) for s in range(50)]
    assert any(row["inputs"].tolist() == [*tokens, EOS] for row in made)
    for count, prompt in ((0, "ab"), (2, "a__b__")):
        with pytest.raises(ConfigError, match=f"must stand once in a prompt, not {count} times as in '{prompt}'"):
            check_prompts(model_of(), TOKENIZER, ["__", prompt], 1, gap="__")


def test_learned_positions_bound_what_is_read_and_what_is_written() -> None:
    decoder = model_of(positions="learned", num_positions=10)
    assert [max_new_tokens(decoder, count) for count in (1, 10, 11)] == [9, 0, -1]
    pair = model_of(positions="learned", num_positions=10, architecture="encoder_decoder")
    assert [max_new_tokens(pair, count) for count in (1, 10, 11)] == [9, 9, -1]
    assert max_new_tokens(pair, 3, num_begin_tokens=2) == 7
    assert max_new_tokens(model_of(), 10**6) is None
    check_prompts(pair, TOKENIZER, ["", "x" * 9], 9)
    for prompt, count in (("x" * 10, 1), ("x" * 9, 10)):
        with pytest.raises(ConfigError, match=r"new ones are more than model.num_positions = 10"):
            check_prompts(pair, TOKENIZER, ["", prompt], count)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (6, 3), (2, 8), (1, 1)])
def test_batches_are_of_one_size_and_have_every_prompt(count: int, size: int) -> None:
    prompts = ["x" * (number * 5 % 7) for number in range(count)]
    batches = batches_by_length(TOKENIZER, prompts, size)
    assert {len(batch) for batch in batches} == {min(size, count)}
    order = [number for batch in batches for number in batch]
    assert set(order) == set(range(count)) and len(order) < count + size
    lengths = [len(prompts[number]) for number in order]
    assert lengths == sorted(lengths, reverse=True)


def test_buckets_are_few_and_never_much_too_long():
    found = {length: bucket(length) for length in range(1, 5000)}
    assert len(set(found.values())) < 35
    assert all(length <= size <= max(length + 31, 1.25 * length) for length, size in found.items())
    assert all(bucket(size) == size for size in found.values())


def test_prompt_files(tmp_path):
    """Lines, also empty ones, so that line n of an output belongs to line n; records; both compressed."""
    for name in ("prompts.txt", "prompts.de"):
        (tmp_path / name).write_text("zwei Hunde\n\nein → Mann\r\nohne Ende", newline="")
        assert read_prompts(tmp_path / name, "text", "strict") == ["zwei Hunde", "", "ein → Mann", "ohne Ende"]
    (tmp_path / "lines.gz").write_bytes(gzip.compress(b"a\nb\n"))
    assert read_prompts(tmp_path / "lines.gz", "text", "strict") == ["a", "b"]
    (tmp_path / "records.jsonl").write_text('{"de": "Hund\\nund"}\n{"de": "", "en": "x"}\n')
    assert read_prompts(tmp_path / "records.jsonl", "de", "strict") == ["Hund\nund", ""]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, r"--prompt-file = '.*none.txt': does not exist"),
        ("empty.txt", b"", r"--prompt-file = '.*empty.txt': is empty"),
        ("empty.jsonl", b"", r"--prompt-file = '.*empty.jsonl': is empty"),
        ("latin.txt", b"a\ncaf\xe9", r"latin.txt is not UTF-8: byte 0xe9 at offset 5"),
        ("other.jsonl", b'{"x": 1}', r"--prompt-field = 'text': .*other.jsonl, line 1, has the fields x"),
        ("broken.jsonl", b"{", r"line 1, is not JSON"),
    ],
)
def test_prompt_files_that_cannot_be_read(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=told):
        read_prompts(tmp_path / name, "text", "strict")

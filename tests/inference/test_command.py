"""`transformer generate` from a run directory: files of prompts and of texts, and which method an option asks for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import TOKENIZER, build, make_run

from transformer import cli
from transformer.arguments import exit_status
from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.inference.beam import beam_search
from transformer.inference.generate import generate
from transformer.inference.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_device")

PROMPTS = ["dead beef", "", "a faded cafe", "bad", "cab"]
READER: dict[str, Any] = {"architecture": "encoder_decoder", "positions": "learned", "num_positions": 32}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, a draft for it, and an encoder-decoder."""
    place = tmp_path_factory.mktemp("runs")
    make_run(place / "decoder")
    make_run(place / "draft", seed=9)
    make_run(place / "pairs", **READER)
    make_run(place / "middle", objective="fill_in_the_middle", num_marks=3)
    return place


@pytest.fixture
def ask(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Returns a function from a run and flags to what `generate` prints, in the directory of the runs."""
    monkeypatch.chdir(runs)

    def run(workdir: str, *flags: str) -> str:
        capsys.readouterr()
        assert cli.run(["generate", "--workdir", workdir, "--max-tokens", "12", *flags]) == 0
        return capsys.readouterr().out

    return run


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def test_a_file_is_translated_line_by_line(runs: Path, ask: Callable[..., str]) -> None:
    """In the order of the file, in batches of three; a blank line is a prompt, too."""
    (runs / "test.de").write_text("".join(prompt + "\n" for prompt in PROMPTS))
    flags = [
        "--prompt-file",
        "test.de",
        "--beams",
        "3",
        "--num-samples",
        "2",
        "--batch-size",
        "3",
        "--output",
        "out.en",
    ]
    model, params = build(**READER)
    expected = [
        text
        for start in (0, 2)
        for texts in beam_search(
            model, params, TOKENIZER, PROMPTS[start : start + 3], 12, num_beams=3, num_best=2, alpha=0.6
        )
        for text in texts
    ]
    expected = [*expected[:6], *expected[8:]]
    assert ask("pairs", *flags) == ""
    assert (runs / "out.en").read_text().splitlines() == [text.text for text in expected]
    ask("pairs", *flags, "--json")
    records = [json.loads(line) for line in (runs / "out.en").read_text().splitlines()]
    assert [record["text"] for record in records] == [text.text for text in expected]
    np.testing.assert_allclose(
        [record["score"] for record in records], [text.score or 0 for text in expected], rtol=1e-4
    )
    assert [record["prompt"] for record in records] == [prompt for prompt in PROMPTS for _ in range(2)]


def test_samples_of_records_do_not_depend_on_the_batches(runs: Path, ask: Callable[..., str]) -> None:
    """Ten texts in batches of three, which mix prompts and samples."""
    (runs / "prompts.jsonl").write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in PROMPTS))
    flags = ["--prompt-file", "prompts.jsonl", "--prompt-field", "question", "--num-samples", "2", "--seed", "5"]
    flags += [
        "--temperature",
        "1.2",
        "--top-k",
        "8",
        "--top-p",
        "0.99",
        "--min-p",
        "0.01",
        "--repetition-penalty",
        "1.1",
    ]
    shown = ask("decoder", *flags, "--batch-size", "3")
    ask("decoder", *flags, "--output", "out.jsonl", "--batch-size", "3")
    records = [json.loads(line) for line in (runs / "out.jsonl").read_text().splitlines()]
    assert [one_line(record["text"]) for record in records] == shown.splitlines()
    model, params = build()
    for sample in range(2):
        rows = [(number, sample) for number in range(3)]
        sampling = Sampling(1.2, 8, 0.99, 0.01, 1.1)
        expected = generate(model, params, TOKENIZER, PROMPTS[:3], 12, sampling, seed=5, rows=rows)
        assert [tuple(record["tokens"]) for record in records[sample:6:2]] == [text.tokens for text in expected]
    assert all("score" not in record for record in records)


def test_a_draft_changes_no_greedy_text(ask: Callable[..., str]) -> None:
    flags = ["--prompt", *PROMPTS[:3], "--temperature", "0", "--json"]
    assert ask("decoder", *flags, "--draft", "draft", "--draft-tokens", "3") == ask("decoder", *flags)


def test_an_encoder_decoder_shows_what_it_writes_alone(ask: Callable[..., str]) -> None:
    """A single text as it grows, several one after another; each with what it had to begin with."""
    flags = ["--temperature", "0", "--target-prefix", "bad", "--prompt"]
    texts = generate(*build(**READER), TOKENIZER, PROMPTS[:3], 12, Sampling(0.0), begin="bad")
    assert ask("pairs", *flags, PROMPTS[0]) == f"bad{texts[0].text}\n"
    assert ask("pairs", *flags, *PROMPTS[:3]) == "".join(f"--- {n}\nbad{text.text}\n" for n, text in enumerate(texts))


def test_stop_strings(ask: Callable[..., str]) -> None:
    flags = ["--prompt", *PROMPTS[:3], "--temperature", "0", "--json"]
    whole = [text["text"] for text in json.loads(ask("decoder", *flags))]
    stop = max(whole, key=len)[3:5]
    found = [text["text"] for text in json.loads(ask("decoder", *flags, "--stop", "xyz", stop))]
    assert found == [text.partition(stop)[0] for text in whole] != whole


def test_a_gap_is_filled_in_where_it_stands(ask: Callable[..., str]) -> None:
    """In every way that texts are found, and with no mark in what is written."""
    flags = ("--prompt", "ab_cd", "--gap", "_", "--temperature", "0")
    [text] = json.loads(ask("middle", *flags, "--json"))
    assert text["prompt"] == "ab_cd" and text["text"] and "_" not in text["text"]
    whole = f"ab{text['text']}cd\n"
    assert ask("middle", *flags) == whole
    assert ask("middle", *flags, "--num-samples", "2") == f"--- 0\n{whole}--- 1\n{whole}"
    assert ask("middle", *flags, "--draft", "middle") == f"--- 0\n{whole}"
    assert ask("middle", *flags[:4], "--beams", "1", "--length-penalty", "0") == f"--- 0\n{whole}"
    drawn = json.loads(ask("middle", *flags[:4], "--temperature", "9", "--num-samples", "16", "--json"))
    assert {token for text in drawn for token in text["tokens"]} <= set(range(TOKENIZER.vocab_size))
    assert len({text["text"] for text in drawn}) > 8


MISTAKES: dict[str, tuple[str, list[str], list[str]]] = {
    "beams and drawing": (
        "pairs",
        ["--beams", "4", "--temperature", "0.5", "--stop", "x", "--draft", "draft", "--num-samples", "5"],
        [
            "--beams = 4 searches and draws nothing: leave out --temperature, --stop, --draft",
            "--num-samples = 5: --beams = 4 finds no more than that",
        ],
    ),
    "values": (
        "decoder",
        ["--min-p", "2", "--repetition-penalty", "0", "--beams", "-1", "--batch-size", "0", "--stop", ""],
        [
            "--batch-size = 0: must be greater than 0 and at most 16,777,216",
            "--min-p = 2.0: must be from 0 to 1",
            "--repetition-penalty = 0.0: must be greater than 0",
            "--beams = -1: must be from 0 to 4096",
            "--stop = '': an empty text would end every text",
        ],
    ),
    "two sources of prompts": (
        "decoder",
        ["--prompt", "a", "--prompt-file", "test.de"],
        ["--prompt and --prompt-file are both given: give one"],
    ),
    "an empty file": (
        "decoder",
        ["--prompt-file", "empty.txt"],
        ["--prompt-file = 'empty.txt': is empty, so there is nothing to do"],
    ),
    "no place for the output": (
        "decoder",
        ["--output", "nowhere/out.txt"],
        ["--output = 'nowhere/out.txt': the directory nowhere does not exist"],
    ),
    "an encoder": ("encoder", [], ["the model cannot generate: an encoder writes no text"]),
    "a draft with another tokenizer": (
        "decoder",
        ["--draft", "bytes"],
        ["the draft has another tokenizer, of 260 tokens, not the 13 of the model: train it with the model's"],
    ),
    "a draft that is none": ("decoder", ["--draft", "x"], ["x is not a run directory: it has no config.json"]),
    "a long prompt": (
        "learned",
        ["--prompt", "a" * 60],
        [
            "a prompt of 61 tokens and 200 new ones are more than model.num_positions = 32, "
            "the positions that the model has learned"
        ],
    ),
    "a gap that cannot be filled in": (
        "decoder",
        ["--gap", "_"],
        [
            "--gap = '_': only a model trained with objective.name = 'fill_in_the_middle', and this run's is 'causal', "
            "can fill it in"
        ],
    ),
    "a prompt without its gap": (
        "middle",
        ["--gap", "_", "--prompt", "ab"],
        ["--gap = '_': must stand once in a prompt, not 0 times as in 'ab'"],
    ),
    "a begin": (
        "decoder",
        ["--target-prefix", "a"],
        ["only an encoder-decoder begins its texts apart from the prompt: write both in the prompt"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(
    case: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is told in a sentence, before anything is compiled."""
    monkeypatch.chdir(runs)
    workdir, flags, told = MISTAKES[case]
    (runs / "empty.txt").write_text("")
    if workdir == "encoder":
        make_run(runs / workdir, architecture="encoder")
    if workdir == "learned":
        make_run(runs / workdir, positions="learned", num_positions=32)
    if "bytes" in flags:
        make_run(runs / "bytes", ByteTokenizer())
    assert exit_status(cli.run, ["generate", "--workdir", workdir, *flags]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {sentence}" for sentence in told]

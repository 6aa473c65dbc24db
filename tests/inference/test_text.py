"""Text that comes piece by piece."""

import itertools

import numpy as np
import pytest

from transformer.data.plain_tokenizers import ByteTokenizer
from transformer.data.tokenizers import BOS, EOS
from transformer.inference.text import Text

TOKENIZER = ByteTokenizer()


def text_of(prompt: str = "", *stop: str) -> Text:
    return Text(TOKENIZER, np.array([BOS, *TOKENIZER.encode(prompt)]), stop)


def test_text_comes_in_whole_characters() -> None:
    """A character of several bytes comes when its last byte does, and the pieces add up to the text."""
    text = text_of("é: ")
    wanted = "aé→𝄞 ß"
    ids = TOKENIZER.encode(wanted).tolist()
    pieces = [text.add([token], last=False) for token in ids]
    assert [piece for piece in pieces if piece] == list(wanted)
    assert text.add([EOS], last=False) == "" and text.ended
    assert text.add([int(ids[0])], last=False) == "", "nothing after the end"
    generation = text.generation("é: ")
    assert (generation.prompt, generation.text, generation.tokens) == ("é: ", wanted, tuple(ids))


def test_an_unfinished_character_is_told_at_the_end() -> None:
    first, second, third = TOKENIZER.encode("→").tolist()
    for last_token, is_last in ((second, True), (EOS, False)):
        text = text_of()
        assert text.add([first], last=False) == ""
        assert text.add([last_token], last=is_last) == "\ufffd"
    text = text_of()
    assert [text.add([token], last=False) for token in (first, second, third)] == ["", "", "→"]


@pytest.mark.parametrize(
    ("stop", "written", "pieces"),
    [
        (("stop",), "no st no stop more", ["n", "o", " ", "", "", "st ", "n", "o", " ", "", "", "", ""]),
        # A mistaken begin may hold the begin of the real one.
        (("aab",), "aaab", ["", "", "a", ""]),
        # The text is cut at the one that is whole first, and what was held for the other comes out.
        (("xyz", "q"), "wxyq", ["w", "", "", "xy"]),
        (("→",), "a→", ["a", "", "", ""]),
        (("\n\n",), "a\nb\n\n", ["a", "", "\nb", "", ""]),
        (("z",), "abc", ["a", "b", "c"]),
    ],
)
def test_a_stop_string_ends_the_text_and_no_part_of_it_comes_out(
    stop: tuple[str, ...], written: str, pieces: list[str]
) -> None:
    text = text_of("stop", *stop)
    found = []
    for token in TOKENIZER.encode(written):
        if text.ended:
            break
        found.append(text.add([int(token)], last=False))
    assert found == pieces
    expected = min((written[: written.index(s)] for s in stop if s in written), key=len, default=written)
    assert "".join(found) == text.text == expected
    assert text.ended == any(s in written for s in stop)
    together = text_of("stop", *stop)
    assert together.add([*TOKENIZER.encode(written).tolist(), EOS, 5], last=True) == expected
    assert together.ended and together.tokens[6:] == text.tokens[6:]


def test_what_only_looked_like_a_stop_string_comes_out_at_the_end() -> None:
    for last_token, is_last in ((TOKENIZER.encode("o")[0], True), (EOS, False)):
        text = text_of("", "stop")
        told = [text.add([int(token)], last=False) for token in TOKENIZER.encode("a st")]
        assert told == ["a", " ", "", ""]
        assert text.add([int(last_token)], last=is_last) == ("sto" if is_last else "st")
        assert text.ended == (not is_last)


def test_pieces_are_those_of_a_search_in_the_whole_text() -> None:
    """All texts of two letters, against the definition: as much as no stop string can still take away."""
    stop = ("aba", "bb")
    for written in map("".join, itertools.product("ab", repeat=7)):
        text, told = text_of("", *stop), ""
        for count, token in enumerate(TOKENIZER.encode(written), 1):
            told += text.add([int(token)], last=False)
            seen = written[:count]
            places = [seen.index(s) for s in stop if s in seen]
            if places:
                assert told == seen[: min(places)] and text.ended
                break
            safe = next(n for n in range(count + 1) if any(s.startswith(seen[n:]) for s in stop))
            assert told == seen[:safe]

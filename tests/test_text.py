"""Answers piece by piece, with the tokenizer of the embedded checkpoint."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from staticvl.runtime.artifact import TokenizerConfig
from staticvl.runtime.processor.detokenizer import IncrementalDetokenizer
from staticvl.runtime.processor.tokenizer import _is_prefix_of_character, load_tokenizer

from .checkpoints_tokenizers import SCRIPTS, text_of
from .conftest import EMBEDDED

FACTS = TokenizerConfig(kind="tokenizers", style="hf", bos_token_id=1, add_bos=True, image_token_id=574, used=576)
TOKENIZER = load_tokenizer(EMBEDDED, FACTS)
EOS = 2


def read(ids: list[int], *stops: str) -> IncrementalDetokenizer:
    """An answer of these tokens, checked piece by piece."""
    answer = IncrementalDetokenizer(TOKENIZER, stops)
    pieces = [answer.add(i) for i in ids]
    pieces.append(answer.finish())
    assert "".join(pieces) == answer.text
    assert read_at_the_end(ids, *stops) == answer.text
    return answer


def read_at_the_end(ids: list[int], *stops: str) -> str:
    """The text of an answer whose pieces nobody took."""
    answer = IncrementalDetokenizer(TOKENIZER, stops)
    for token in ids:
        answer.add_unread(token)
    answer.finish()
    return answer.text


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_bos=False)


def expected(ids: list[int], stops: list[str]) -> str:
    """All tokens at once, cut at the first stop string, without blanks around."""
    text = text_of(TOKENIZER, ids)
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))].strip()


LETTERS = st.text("ab ré日🙂\n.#", max_size=20)
STOPS = st.lists(st.text("ab é日\n.#", min_size=1, max_size=4), max_size=3).filter(
    # Where one stop string holds another, the one that is complete first wins, which a single look cannot tell.
    lambda stops: not any(one in other for i, one in enumerate(stops) for other in stops[:i] + stops[i + 1 :])
)


@settings(max_examples=300, deadline=None)
@given(text=LETTERS, stops=STOPS)
def test_pieces_are_the_text_up_to_the_first_stop_string(text: str, stops: list[str]) -> None:
    ids = encode(text)
    answer = read(ids, *stops)
    assert answer.text == expected(ids, stops)
    assert answer.stopped == any(stop in TOKENIZER.decode(ids) for stop in stops)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 639), max_size=20), stops=STOPS)
@example(ids=[240, 163], stops=[])  # the first two bytes of a surrogate, which is no character
def test_any_tokens(ids: list[int], stops: list[str]) -> None:
    """Broken characters, special tokens, and ids that the tokenizer does not know."""
    assert read(ids, *stops).text == expected(ids, stops)


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("circle", "A red"),
        ("d cir", "A re"),  # across a token border
        ("A", ""),
        ("red", "A"),  # the blank before it goes too
        (".", "A red circle"),
        ("circles", "A red circle."),  # begins, but is not completed
        ("", "A red circle."),
    ],
)
def test_stop_strings(stop: str, text: str) -> None:
    ids = encode("A red circle.")
    assert len(ids) > 3
    assert read(ids, stop).text == text


def test_the_first_of_several_stop_strings() -> None:
    assert read(encode("one, two. three"), ".", ",", "three").text == "one"
    # Characters of several tokens are released together.
    assert read(encode("日本語"), "語", "本").text == "日"


def test_nothing_of_a_stop_string_is_given_out_early() -> None:
    answer = IncrementalDetokenizer(TOKENIZER, ["cde"])
    given_out = [answer.add(i) for letter in "abcdxcde" for i in encode_letter(letter)]
    assert given_out == ["a", "b", "", "", "cdx", "", "", ""]
    assert answer.stopped


def encode_letter(letter: str) -> list[int]:
    """A letter as the token that stands in the middle of a word."""
    token = TOKENIZER.vocabulary.token_id(letter)
    assert token is not None
    return [token]


def test_nothing_after_a_stop_string() -> None:
    answer = IncrementalDetokenizer(TOKENIZER, ["b"])
    ids = [i for letter in "abc" for i in encode_letter(letter)]
    assert [answer.add(i) for i in ids] == ["a", "", ""]
    assert answer.finish() == ""


def test_blanks_inside_stay_and_around_go() -> None:
    assert read(encode("  a  b\n c \n ")).text == "a  b\n c"


def test_blanks_are_held_until_something_follows() -> None:
    answer = IncrementalDetokenizer(TOKENIZER, [])
    given_out = [answer.add(i) for i in encode("a b")]
    assert given_out == ["a", " b"]
    newline = TOKENIZER.vocabulary.token_id("<0x0A>")
    assert newline is not None
    assert answer.add(newline) == ""
    assert [answer.add(i) for i in encode_letter("c")] == ["\nc"]


def test_characters_of_several_tokens_arrive_whole() -> None:
    ids = encode("日🙂")
    answer = IncrementalDetokenizer(TOKENIZER, [])
    assert [answer.add(i) for i in ids] == [""] * len(ids)
    assert answer.finish() == "日🙂"


def test_a_stop_string_of_bytes_that_only_the_end_completes() -> None:
    answer = read(encode("a 日"), "日")
    assert answer.text == "a"
    assert answer.stopped


@pytest.mark.parametrize("text", SCRIPTS)
def test_an_answer_that_is_cut_keeps_what_is_complete(text: str) -> None:
    """Newlines and whole characters before the cut; and a stop string among them counts."""
    ids = encode(text)
    for end in range(len(ids)):
        got = read(ids[:end]).text
        assert text.startswith(got.removesuffix("\ufffd"))
        data = b"".join(map(TOKENIZER.vocabulary.token_bytes, ids[:end]))
        assert got == data.decode(errors="replace").strip()
        if len(got) > 2:
            stopped = read(ids[:end], got[1:-1])
            assert stopped.stopped and stopped.text == got[: got.index(got[1:-1])].rstrip()


def test_special_tokens_are_not_text() -> None:
    assert read([*encode("a"), FACTS.image_token_id or 0, EOS]).text == "a"


def test_nothing() -> None:
    assert read([]).text == ""
    assert read([EOS], "x").text == ""


def test_prefixes_of_characters() -> None:
    """Of all one to three bytes, just the proper prefixes of what Python writes for a character."""
    characters = (chr(code).encode() for code in range(0x80, 0x110000) if not 0xD800 <= code < 0xE000)
    prefixes = {data[:size] for data in characters for size in range(1, len(data))}
    firsts = [bytes([one]) for one in range(256)]
    continued = [one + bytes([two]) for one in firsts for two in range(256)]
    further = [two + bytes([three]) for two in continued if two in prefixes for three in range(0x70, 0xD0)]
    assert {data for data in (*firsts, *continued, *further) if _is_prefix_of_character(data)} == prefixes

"""Vocabularies in tiktoken's form: golden ids of Qwen-VL's own tokenizer, and Llama-3's form against transformers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from staticvl.compiler.tiktoken_forms import LLAMA3, QWEN
from staticvl.runtime.artifact import TokenizerConfig
from staticvl.runtime.processor.tiktoken_vocabulary import TAGS, TiktokenVocabulary, is_tiktoken, read_ranks
from staticvl.runtime.processor.tokenizer import Detokenizer, Tokenizer, TokenizerError, load_tokenizer

from .checkpoints_tokenizers import SCRIPTS
from .tiktoken_files import TEXTS, as_tokenizer_json, filler, trained, write_ranks

GOLDEN = Path(__file__).parent / "golden" / "qwen_vl_tiny"
CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8"))
QWEN_FILE = GOLDEN / "checkpoint" / "qwen.tiktoken"


def with_ids(specials: Iterable[str], first: int) -> dict[str, int]:
    return {token: first + place for place, token in enumerate(specials)}


def qwen(visible: Iterable[str] = TAGS) -> TiktokenVocabulary:
    added = with_ids(QWEN.specials, 336)
    return TiktokenVocabulary(QWEN_FILE, added, pattern=QWEN.pattern, nfc=True, visible=frozenset(visible))


def test_ids_of_the_special_tokens() -> None:
    vocabulary = qwen()
    assert (len(read_ranks(QWEN_FILE)), vocabulary.size) == (CASES["n_mergeable"], CASES["total_ids"]) == (336, 553)
    for token, token_id in CASES["special_ids"].items():
        assert vocabulary.token_id(token) == token_id and vocabulary.token(token_id) == token
    assert vocabulary.token_id("Hello world") is None and vocabulary.token_id("a") == 64
    assert vocabulary.token(553) is None and vocabulary.decode([553, 64, -1], skip_special=False) == "a"


def path_as_text(ids: list[int], vocabulary: TiktokenVocabulary) -> list[int]:
    """Ids of the original code with the bytes of an image's path, and what fills them up, as ids of a text."""
    start, end, pad = (vocabulary.token_id(token) for token in ("<img>", "</img>", "<imgpad>"))
    out: list[int] = []
    rest = list(ids)
    while start in rest:
        first, last = rest.index(start), rest.index(end)
        path = bytes(i for i in rest[first + 1 : last] if i != pad).decode()
        out += [*rest[: first + 1], *vocabulary.encode(path), end]
        rest = rest[last + 1 :]
    return out + rest


@pytest.mark.parametrize("case", CASES["encode"], ids=lambda case: case["text"][:20])
def test_golden_ids(case: dict[str, Any]) -> None:
    vocabulary = qwen()
    assert vocabulary.encode(case["text"]) == path_as_text(case["ids"], vocabulary)


@pytest.mark.parametrize("case", CASES["encode_no_special"], ids=lambda case: case["text"][:20])
def test_golden_ids_without_special_tokens(case: dict[str, Any]) -> None:
    assert qwen().encode(case["text"], specials=case["allowed_special"]) == case["ids"]


@pytest.mark.parametrize("case", CASES["decode"], ids=lambda case: case["text"][:20])
def test_golden_texts(case: dict[str, Any]) -> None:
    vocabulary = qwen(visible=())
    ids = path_as_text(case["ids"], vocabulary)
    assert vocabulary.decode(ids, skip_special=False) == case["text"]
    assert vocabulary.decode(ids, skip_special=True) == case["text_skip_special"]


def test_tags_are_part_of_an_answer_and_other_special_tokens_are_not() -> None:
    vocabulary = qwen()
    tags = "<ref>a</ref><box>(1,2),(3,4)</box><quad></quad><img></img><imgpad>"
    ids = vocabulary.encode(f"{tags}<|im_end|><|extra_3|><|endoftext|>")
    assert vocabulary.decode(ids, skip_special=False).endswith("<imgpad><|im_end|><|extra_3|><|endoftext|>")
    assert vocabulary.decode(ids, skip_special=True) == tags
    assert [vocabulary.is_special(i) for i in ids[-4:]] == [False, True, True, True]


def test_only_the_special_tokens_asked_for_are_recognised() -> None:
    vocabulary = qwen()
    ids = vocabulary.encode("<|im_end|><box>", specials=TAGS)
    assert ids[-1] == 546 and 338 not in ids
    assert vocabulary.decode(ids, skip_special=False) == "<|im_end|><box>"


def test_digits_are_cut_one_by_one() -> None:
    """The golden vocabulary joins no digits; Qwen2 kept the way in which Qwen cuts text into words."""
    assert QWEN.pattern == PRETOKENIZE_REGEX


def test_letters_are_composed_first() -> None:
    vocabulary = qwen()
    assert vocabulary.encode("e\u0301 \u212b") == vocabulary.encode("\u00e9 \u00c5")
    plain = TiktokenVocabulary(QWEN_FILE, {}, pattern=QWEN.pattern, nfc=False)
    assert plain.encode("e\u0301") != plain.encode("\u00e9")


# --- Llama-3's form ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]:
    """The same tokenizer three times: our tiktoken form, our tokenizer.json, and transformers'."""
    folder = tmp_path_factory.mktemp("llama")
    tokens = trained()
    path = write_ranks(folder / "tokenizer.model", tokens)
    as_tokenizer_json(path, LLAMA3.specials).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<|begin_of_text|>"}))
    added = with_ids(LLAMA3.specials, len(tokens))
    common: dict[str, Any] = {
        "style": "hf", "bos_token_id": len(tokens), "add_bos": True, "image_token_id": len(tokens) + 256,
        "used": len(tokens) + 256,
    }  # fmt: skip
    ours = TokenizerConfig(kind="tiktoken", file="tokenizer.model", pattern=LLAMA3.pattern, added_tokens=added, **common)
    return (
        load_tokenizer(folder, ours),
        load_tokenizer(folder, TokenizerConfig(kind="tokenizers", **common)),
        AutoTokenizer.from_pretrained(folder),
    )


def test_the_built_in_special_tokens_are_the_published_ones() -> None:
    path = Path(__file__).parents[2] / "shared/published/meta-llama--Llama-3.2-11B-Vision-Instruct/tokenizer_config.json"
    if not path.is_file():
        pytest.skip("the published files are not beside this checkout")
    published = json.loads(path.read_text())["added_tokens_decoder"]
    assert {token: int(i) for i, token in ((i, entry["content"]) for i, entry in published.items())} == with_ids(
        LLAMA3.specials, 128000
    )


PIECES = [
    *LLAMA3.specials[:11], "<|image|>", "<|reserved_special_token_246|>", "<|eot_id", "|>", "<|", " ", "  ", "   ",
    "\n", "\n\n", "\r\n", "\t", " \n ", "What", " is", "picture", "I'LL", "'s", "'", "’s", "1", "23", "456", "7890123",
    "图中", "的狗", "？", "😀", "👩‍👩‍👧", "한국", "é", "e\u0301", "\u00a0", "\u3000", "\u200b", "ſ", "ΑΣ", "_", "!?", "...",
    "-", "\x00", "\ufffd", "ٱ", "²", "Ⅷ",
]  # fmt: skip


def same_ids(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    tiktoken, fast, theirs = llama
    expected = theirs(text, add_special_tokens=False)["input_ids"]
    assert tiktoken.encode(text, add_bos=False) == expected == fast.encode(text, add_bos=False), repr(text)
    for skip in (False, True):
        decoded = theirs.decode(expected, skip_special_tokens=skip)
        assert tiktoken.decode(expected, skip_special=skip) == decoded == fast.decode(expected, skip_special=skip)


def test_ids_equal_those_of_transformers(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]) -> None:
    rng = random.Random(7)
    for text in [*TEXTS, "", *("".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(4000))]:
        same_ids(llama, text)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=600, deadline=None)
@given(text=ANY_TEXT | st.text(st.sampled_from(" \n\t\ra1'.的"), max_size=40))
def test_ids_of_any_text(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast], text: str) -> None:
    same_ids(llama, text)


def test_clean_up_of_spaces_does_not_apply(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]) -> None:
    """Llama-3.2's tokenizer_config asks for it; transformers 5 leaves the text of a byte-level BPE alone, and so do we."""
    tiktoken, fast, theirs = llama
    assert theirs.clean_up_tokenization_spaces is True
    text = "it 's , do n't . ? !"
    ids = tiktoken.encode(text, add_bos=False)
    assert theirs.decode(ids) == tiktoken.decode(ids) == fast.decode(ids) == text


def pieces(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


def test_pieces_joined_equal_the_whole(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]) -> None:
    rng = random.Random(8)
    size = llama[0].vocabulary.size
    cases = [llama[0].encode("".join(rng.choices(PIECES, k=8)), add_bos=True) for _ in range(200)]
    cases += [[rng.randrange(size + 3) for _ in range(10)] for _ in range(200)]
    cases += [[rng.randrange(256) for _ in range(12)] for _ in range(300)]  # single bytes: broken UTF-8 above all
    qwen_tokenizer = Tokenizer(llama[0].config, qwen())
    for ids in cases:
        for tokenizer in (*llama[:2], qwen_tokenizer):
            for skip in (True, False):
                assert "".join(pieces(tokenizer, ids, skip_special=skip)) == tokenizer.decode(ids, skip_special=skip), ids


def test_what_is_complete_before_a_cut_is_kept(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]) -> None:
    """As transformers decodes the same ids."""
    by_bytes = {token: rank for rank, token in enumerate(trained())}
    for text in SCRIPTS:
        whole, single = llama[0].encode(text, add_bos=False), [by_bytes[bytes([byte])] for byte in text.encode()]
        for ids in (*(whole[:end] for end in range(len(whole))), *(single[:end] for end in range(len(single)))):
            theirs = llama[2].decode(ids)
            assert theirs.removesuffix("\ufffd") == text[: len(theirs.removesuffix("\ufffd"))]
            for tokenizer in llama[:2]:
                assert "".join(pieces(tokenizer, ids, skip_special=True)) == theirs, (text, ids)


def test_a_character_is_held_back_until_it_is_whole(llama: tuple[Tokenizer, Tokenizer, PreTrainedTokenizerFast]) -> None:
    by_bytes = {token: rank for rank, token in enumerate(trained())}
    ids = [by_bytes[bytes([byte])] for byte in "aé的😀b".encode()]
    for tokenizer in llama[:2]:
        assert pieces(tokenizer, ids, skip_special=True) == ["a", "", "é", "", "", "的", "", "", "", "😀", "b", ""]
        assert pieces(tokenizer, ids[:-2], skip_special=True)[-1] == "\ufffd"


# --- Files ------------------------------------------------------------------------------------------------------------


def test_forms_of_the_file(tmp_path: Path) -> None:
    tokens = trained()
    assert read_ranks(write_ranks(tmp_path / "a", tokens, end=b"\r\n")) == {token: i for i, token in enumerate(tokens)}
    assert is_tiktoken(tmp_path / "a")
    (tmp_path / "b").write_bytes(b"\n\x05\x08\x01\x10\x02protobuf")
    assert not is_tiktoken(tmp_path / "b")
    assert len(read_ranks(write_ranks(tmp_path / "c", filler(128_000)))) == 128_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["x", *lines], r"line 1 is b'x'; expected base64, a blank and a rank: fetch the file again"),
        (lambda lines: [*lines[:5], "QQ=== 5"], r"line 6 is b'QQ=== 5'; expected base64"),
        (lambda lines: [*lines[:5], "Q 5"], r"line 6 is b'Q 5'; expected base64"),
        (lambda lines: [*lines[:5], *lines[6:]], r"line 6: b'\\x06' has rank 6; expected a new token of rank 5: fetch"),
        (lambda lines: [*lines[:5], lines[0].replace(" 0", " 5")], r"line 6: .* has rank 5; expected a new token of rank 5"),
        (lambda lines: lines[:250], r"lacks 6 of the 256 single bytes; fetch the file again"),
        (lambda lines: [], r"lacks 256 of the 256 single bytes"),
    ],
)
def test_damaged_files(tmp_path: Path, change: Any, message: str) -> None:
    path = write_ranks(tmp_path / "qwen.tiktoken", filler(300))
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(TokenizerError, match=message) as caught:
        TiktokenVocabulary(path, {}, pattern=QWEN.pattern, nfc=True)
    assert "\n" not in str(caught.value)


def test_other_errors(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "qwen.tiktoken", filler(300))
    with pytest.raises(TokenizerError, match=r"has 300 tokens, so that \{'<a>': 299\} are taken; take the file that belongs"):
        TiktokenVocabulary(path, {"<a>": 299}, pattern=QWEN.pattern, nfc=True)
    with pytest.raises(TokenizerError, match=r"the pattern '\(' for .* is not a regular expression"):
        TiktokenVocabulary(path, {}, pattern="(", nfc=True)
    with pytest.raises(TokenizerError, match=r"cannot be cut into words .*; shorten its longest run of blanks"):
        qwen().encode(" " * 3_000_000)
    info = TokenizerConfig(
        kind="tiktoken", style="hf", bos_token_id=0, add_bos=False, file="none", pattern="", image_token_id=None, used=1
    )
    with pytest.raises(TokenizerError, match="none is missing; copy the whole artifact folder or compile again"):
        load_tokenizer(tmp_path, info)
    with pytest.raises(TokenizerError, match="not valid Unicode"):
        Tokenizer(info, qwen()).encode("\ud800", add_bos=False)


def test_nothing_is_downloaded() -> None:
    """The package can fetch OpenAI's vocabularies; the part of it that is used here cannot."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from staticvl.runtime.processor.tiktoken_vocabulary import TiktokenVocabulary\n"
        f"TiktokenVocabulary(Path({str(QWEN_FILE)!r}), {{}}, pattern='.', nfc=True).encode('a')\n"
        "assert not {'requests', 'urllib3', 'blobfile'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

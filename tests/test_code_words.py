"""The words of the product's code: names, comments, docstrings, messages and pages are in the field's terms.

Words that the project once had for them are counted, by whole words; names are split at underscores and capitals. None may come
back. EXCEPTIONS lists uses that stay, with their reasons; one that is no longer there is a failure too.
"""

import io
import re
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "compiler", "model_defs", "weights", "tools")

# Old word -> the term in its place.
WORDS = {
    "asked": "requested",
    "beginning": "prefix",
    "behind": "after",
    "blame": "failure report",
    "crew": "workers",
    "found": "a noun for what a name holds; computed, matched, read",
    "ledger": "cache keys",
    "likeliest": "top-k",
    "nobody": "no request, no client, no thread",
    "picture": "image",
    "pictures": "image",
    "said": "set, written",
    "seat": "rank info",
    "sight": "cross-attention mask",
    "told": "a noun for what a name holds",
    "verdict": "failure report",
    "wanted": "expected, requested",
    "whoever": "the caller, the client",
}
PHRASES = {
    "as ever": "unchanged",
    "as it likes": "in its own way",
    "cut among": "sharded over",
    "for itself": "once for each",
    "is looked for": "is searched, is checked",
    "put out": "output",
    "takes over": "reuses",
    "taken over": "reused",
    "what is of": "a noun",
}

STORED = "a key or a name that is stored or printed as JSON"
SENTENCE = "a sentence or a mark that models were trained on"
# (file, word or phrase) -> how often it is there, and why it stays.
EXCEPTIONS = {
    ("compiler/build_record.py", "pictures"): (1, STORED),
    ("compiler/model_card.py", "picture"): (2, SENTENCE),
    ("tools/demo.py", "picture"): (2, SENTENCE),
    ("tools/show.py", "pictures"): (1, STORED),
    ("runtime/manifest/manifest.py", "pictures"): (1, STORED),
    ("runtime/engine/metrics.py", "picture"): (1, STORED),
    ("runtime/processor/families/qwen_vl.py", "picture"): (2, SENTENCE),
    ("runtime/processor/qwen_boxes.py", "picture"): (4, SENTENCE),
    ("tools/ascend_acceptance.py", "picture"): (1, SENTENCE),
    ("tools/bench.py", "picture"): (1, STORED),
    ("tools/cli.py", "picture"): (1, SENTENCE),
    ("tools/questions/conversations.py", "picture"): (2, SENTENCE),
    ("tools/comparing/samples.py", "picture"): (1, SENTENCE),
    ("tools/development/training/data.py", "picture"): (1, SENTENCE),
    ("tools/development/training/evaluation.py", "picture"): (1, "a kind in the tables of the published model cards"),
    ("tools/development/training/evaluation.py", "pictures"): (1, "a kind in the tables of the published model cards"),
    ("tools/development/training/layout_mllama.py", "pictures"): (4, "the stored chat template of a trained model"),
    ("tools/drawings.py", "picture"): (6, SENTENCE),
    ("tools/serving/page.html", "picture"): (1, SENTENCE),
}


def texts(path: Path) -> list[str]:
    """The names of a source file, and its comments and strings without line breaks; of another file its text."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return [source]
    names: list[str] = []
    prose: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            names.append(token.string)
        elif token.type in (tokenize.COMMENT, tokenize.STRING):
            prose.append(token.string.strip("#"))
    return [*names, " ".join(" ".join(prose).split())]


def counts(path: Path) -> Counter[str]:
    """Old words and phrases of a file."""
    result: Counter[str] = Counter()
    for original in texts(path):
        text = re.sub(r"not_?found", "", original, flags=re.IGNORECASE)  # names of errors in Python and HTTP
        words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
        result.update(word for word in map(str.lower, words) if word in WORDS)
        result.update({phrase: n for phrase in PHRASES if (n := len(re.findall(rf"\b{phrase}\b", text, re.IGNORECASE)))})
    return result


def product_files() -> list[Path]:
    """The Python files and pages of the product."""
    files = [path for folder in FOLDERS for end in ("py", "html") for path in (ROOT / folder).rglob(f"*.{end}")]
    return sorted(files)


def test_old_words_do_not_come_back() -> None:
    actual = {(path.relative_to(ROOT).as_posix(), word): n for path in product_files() for word, n in counts(path).items()}
    expected = {place: n for place, (n, _) in EXCEPTIONS.items()}
    wrong = [
        f"{file}: {word!r} {actual.get((file, word), 0)} times, expected {expected.get((file, word), 0)}: "
        f"write {WORDS.get(word) or PHRASES[word]}, or change EXCEPTIONS"
        for file, word in sorted(actual.keys() | expected.keys())
        if actual.get((file, word), 0) != expected.get((file, word), 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_words_of_a_file_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text(
        'class FoundPicture:  # as\n    """Nobody is\n    told."""\n\n    wanted_ids = "# found"  # in the\n'
        "# sharded model, cut\n# among ranks; FileNotFoundError, unfounded\n"
    )
    assert counts(file) == Counter({"found": 2, "picture": 1, "nobody": 1, "told": 1, "wanted": 1, "cut among": 1})

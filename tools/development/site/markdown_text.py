"""Links and headings of Markdown, without what stands in code; anchors as GitHub makes them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_FENCE = r"^ *(?P<fence>`{3,}|~{3,})[^\n]*\n.*?(?:^ *(?P=fence)[`~]*[ \t]*$|\Z)"
_SPAN = r"(?P<ticks>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=ticks)(?!`)"
_DEFINED = r"^ {0,3}\[[^\]\n]+\]:(?: +|[ ]*\n[ ]+)(?=\S+[ ]*$)"  # [label]: target, in one line or two
_LINK = rf"(?P<before>\]\(|{_DEFINED})(?P<target>[^\s()<>]+)"
_CODE_OR_LINK = re.compile(f"{_FENCE}|{_SPAN}|{_LINK}", re.MULTILINE | re.DOTALL)
_FENCED = re.compile(_FENCE, re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t]*#*$", re.MULTILINE)
_CODE_DEFINITION = re.compile(r"^ {0,3}\[(`[^\]\n]+`)\]:[ ]*\n?[ ]*(\S+)[ ]*(?:\n|\Z)", re.MULTILINE)
_FENCE_OR_CODE_LABEL = re.compile(rf"{_FENCE}|\[(?P<label>`[^`\]\n]+`)\](?![(\[])", re.MULTILINE | re.DOTALL)
_LINKED_TEXT = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")


def links(text: str) -> list[str]:
    """The targets of links and images, in order."""
    return [match["target"] for match in _CODE_OR_LINK.finditer(text) if match["target"]]


def with_links(text: str, new: Callable[[str], str]) -> str:
    """The text with every target replaced by what `new` makes of it."""
    return _CODE_OR_LINK.sub(lambda match: match["before"] + new(match["target"]) if match["target"] else match[0], text)


def with_inline_targets(text: str) -> str:
    """The text with [`code`], whose target is defined elsewhere in it, as [`code`](target), and without these definitions.

    Python-Markdown looks for the definition of a label after it has replaced code, and so finds none.
    """
    targets = dict(_CODE_DEFINITION.findall(text))

    def inline(match: re.Match[str]) -> str:
        target = targets.get(match["label"])
        return f"{match[0]}({target})" if target else match[0]

    return _FENCE_OR_CODE_LABEL.sub(inline, _CODE_DEFINITION.sub("", text))


def is_external(target: str) -> bool:
    """Whether a link leaves the repository: it begins with a scheme."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:", target) is not None


def headings(text: str) -> list[str]:
    """The texts of headings, with links and code replaced by their words."""
    headings = _HEADING.findall(_FENCED.sub("", text))
    return [re.sub(r"[`*]", "", _LINKED_TEXT.sub(r"\1", heading)) for heading in headings]


def slug(heading: str, separator: str = "-") -> str:
    """The anchor of a heading as GitHub makes it, for Python-Markdown's `toc` as well."""
    kept = re.sub(r"[^\w\- ]", "", unicodedata.normalize("NFC", heading).strip().lower())
    return kept.replace(" ", separator)


def anchors(text: str) -> set[str]:
    """The anchors of a page.

    Of equal headings only the first has one here: GitHub calls the second `words-1`, Python-Markdown `words_1`.
    """
    return {slug(heading) for heading in headings(text)}

"""Where files of the repository are in the site: docs/ as it is, others as further pages.

Paths are relative, with slashes: of files to the top of the repository, of pages to the site's folder of sources.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .markdown_text import is_external, links

DOCS = "docs/"
SOURCE = "source/"  # pages that show a file of the repository
EVERY_FILE = "files.md"  # stands for folders
INCLUDED = {  # files outside docs/ -> their pages
    "README.md": "project/readme.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CODE_OF_CONDUCT.md": "project/code_of_conduct.md",
    "benchmarks/README.md": "project/benchmarks.md",
}
_IMAGES = (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp")
_LANGUAGES = {"py": "python", "yml": "yaml", "yaml": "yaml", "json": "json", "toml": "toml", "sh": "sh", "html": "html"}


def page_of(path: str) -> str:
    """The page, or the image, that a file of the repository is."""
    if path in INCLUDED:
        return INCLUDED[path]
    if path.startswith(DOCS):
        return path.removeprefix(DOCS)
    return SOURCE + path + ("" if path.endswith(_IMAGES) else ".md")


def file_of(page: str) -> str:
    """The file that a page is made of, for pages of docs/ and those included."""
    return next((path for path, included in INCLUDED.items() if included == page), DOCS + page)


def linked_file(path: str, target: str) -> str | None:
    """The file or folder that `target` names in the file `path`; None for anchors and for what is elsewhere."""
    name = target.partition("#")[0]
    if not name or is_external(target) or name.startswith("/"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), name))


def site_link(repository: Path, page: str, target: str) -> str:
    """The target of a link as it must be in a page of the site. What does not exist stays as it is, and is reported."""
    path = linked_file(file_of(page), target)
    if path is None or not (repository / path).exists():
        return target
    linked, anchor = (EVERY_FILE, "") if (repository / path).is_dir() else (page_of(path), target.partition("#")[2])
    return posixpath.relpath(linked, posixpath.dirname(page) or ".") + (f"#{anchor}" if anchor else "")


def further_files(repository: Path, pages: Iterable[str]) -> list[str]:
    """Files that pages link and that are neither in docs/ nor included, in the order of their names."""
    return sorted({path for page in pages for path in _linked_outside(repository, file_of(page))})


def _linked_outside(repository: Path, path: str) -> Iterator[str]:
    for target in links((repository / path).read_text(encoding="utf-8")):
        linked = linked_file(path, target)
        if linked and not linked.startswith((DOCS, "../")) and linked not in INCLUDED and (repository / linked).is_file():
            yield linked


def source_page(path: str, text: str) -> str:
    """The Markdown of a page that shows a file with its lines numbered; the search leaves it out."""
    longest = max((len(ticks) for ticks in re.findall(r"`+", text)), default=0)
    fence = "`" * max(longest + 1, 3)
    language = _LANGUAGES.get(path.rpartition(".")[2], "text")
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n"
    return f'{head}\n{fence}{language} linenums="1"\n{text.rstrip()}\n{fence}\n'

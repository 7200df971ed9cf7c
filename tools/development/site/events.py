"""What mkdocs calls while it builds the site, by way of hooks.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .markdown_text import slug, with_inline_targets, with_links
from .navigation import expanded
from .package_folder import link_package
from .site_paths import INCLUDED, SOURCE, further_files, page_of, site_link, source_page

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE_FOLDER = REPOSITORY / "build" / "docs-package"  # where mkdocs.yml lets mkdocstrings look
LINE_ANCHOR = re.compile(r'id="__codelineno-0-(\d+)" name="__codelineno-0-\d+"')  # of pymdownx.highlight


def on_startup(command: str, dirty: bool) -> None:
    """mkdocstrings looks for the folder when it reads its settings, so it is made before."""
    link_package(REPOSITORY, PACKAGE_FOLDER)


def on_config(config: Any) -> Any:
    """Anchors as GitHub makes them, and the nav without patterns."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = slug
    config["nav"] = expanded(config["nav"], Path(config["docs_dir"]))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Further pages: the included ones, and files that pages link."""
    from mkdocs.structure.files import File  # pyright: ignore[reportMissingImports]

    own = [file.src_uri for file in files.documentation_pages()]
    for path, page in INCLUDED.items():
        files.append(File.generated(config, page, abs_src_path=str(REPOSITORY / path)))
    for path in further_files(REPOSITORY, [*own, *INCLUDED.values()]):
        files.append(_source_file(File, config, path))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links between files of the repository lead to their pages."""
    return with_links(with_inline_targets(markdown), lambda target: site_link(REPOSITORY, page.file.src_uri, target))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Lines of source files have the anchors that forges give them, and mkdocs knows these."""
    if not page.file.src_uri.startswith(SOURCE):
        return html
    html, count = LINE_ANCHOR.subn(r'id="L\1" name="L\1"', html)
    page.present_anchor_ids |= {f"L{line}" for line in range(1, count + 1)}
    return html


def _source_file(factory: Any, config: Any, path: str) -> Any:
    """A page that shows a file, or an image as it is."""
    page, file = page_of(path), REPOSITORY / path
    if not page.endswith(".md"):
        return factory.generated(config, page, abs_src_path=str(file))
    return factory.generated(config, page, content=source_page(path, file.read_text(encoding="utf-8")))

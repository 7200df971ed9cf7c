"""What mkdocs calls while it builds the site, by way of hooks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .markdown_text import slug, with_links
from .navigation import expanded
from .package_folder import link_package
from .site_paths import INCLUDED, further_files, page_of, site_link, source_page

REPOSITORY = Path(__file__).resolve().parents[3]
PACKAGE_FOLDER = REPOSITORY / "build" / "docs-package"  # where mkdocs.yml lets mkdocstrings look


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
    return with_links(markdown, lambda target: site_link(REPOSITORY, page.file.src_uri, target))


def _source_file(factory: Any, config: Any, path: str) -> Any:
    """A page that shows a file, or an image as it is."""
    page, file = page_of(path), REPOSITORY / path
    if not page.endswith(".md"):
        return factory.generated(config, page, abs_src_path=str(file))
    return factory.generated(config, page, content=source_page(path, file.read_text(encoding="utf-8")))

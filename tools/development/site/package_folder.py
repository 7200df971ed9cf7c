"""A folder in which `staticvl` lies as it is imported, for a reader of sources.

In a checkout its subpackages are folders at the top (setup.py), which mkdocstrings would not find.
"""

from __future__ import annotations

import shutil
from pathlib import Path

PACKAGE = "tools/package"
SUBPACKAGES = ("runtime",)  # those that the reference documents


def link_package(repository: Path, folder: Path) -> None:
    """Make `folder`/staticvl of links to the checkout; what was there is replaced."""
    package = folder / "staticvl"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    (package / "__init__.py").symlink_to(repository / PACKAGE / "__init__.py")
    for name in SUBPACKAGES:
        (package / name).symlink_to(repository / name, target_is_directory=True)

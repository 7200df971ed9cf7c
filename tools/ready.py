"""A check for packages that a command needs later, before it begins."""

from __future__ import annotations

import importlib.util


def require(*packages: str) -> None:
    """Raises ModuleNotFoundError for the first package that is not installed; the command line says how to get it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)

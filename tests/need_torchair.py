"""What every test that needs torchair begins with."""

from __future__ import annotations

import platform

import pytest

from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.backends.ascend import torchair_host

PYTHON = "3.11"  # of the wheel that `make ascend-sim` unpacks


def skip_without_torchair() -> None:
    """Skip the module that calls this where the wheel is of another Python or not at hand, saying how to get it."""
    if ".".join(platform.python_version_tuple()[:2]) != PYTHON:
        pytest.skip(f"artifacts for Ascend hold byte code, and torchair's wheel is of Python {PYTHON}", allow_module_level=True)
    try:
        torchair_host.wheel_folder()
    except ArtifactError as error:
        pytest.skip(str(error), allow_module_level=True)

"""What every test that needs torchair begins with."""

from __future__ import annotations

import pytest

from staticvl.runtime.artifact import ArtifactError
from staticvl.runtime.backends.ascend import torchair_host


def skip_without_torchair() -> None:
    """Skip the module that calls this where the wheel is not at hand, saying how to get it."""
    try:
        torchair_host.wheel_folder()
    except ArtifactError as error:
        pytest.skip(str(error), allow_module_level=True)

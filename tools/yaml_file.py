"""A YAML file as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ..runtime.shown import shown


def read_yaml(path: Path, error: type[Exception], expected: str = "a YAML file") -> Any:
    """The content of a YAML file; raises `error` where there is none, or it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{shown(path)} does not exist; expected {expected}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as fault:
        raise error(f"{path} is not valid YAML: {shown(' '.join(str(fault).split()))}") from fault

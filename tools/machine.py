"""A description of this machine for figures and bug reports."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

from ..runtime.backends import unsigned_weights
from ..runtime.backends.cores import processor_features, processor_name, usable_cores

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of getrusage's figure


def machine() -> dict[str, Any]:
    """The system, the processor's name and features, cores that this process may use, onnxruntime's version, whether the
    processor's products of unsigned by signed bytes are exact, and the session entries that are set where they are not."""
    return {
        "system": platform.platform(),
        "processor": processor_name(),
        "features": list(processor_features()),
        "cores": usable_cores(),
        "onnxruntime": version("onnxruntime"),
        "exact_byte_products": not unsigned_weights.saturates(),
        "session_entries": unsigned_weights.entries(),
    }


def described(info: Mapping[str, Any]) -> str:
    """The description `machine()` in one line."""
    products = "exact" if info["exact_byte_products"] else "cut off in 16 bits, so weights are unsigned"
    entries = ", ".join(f"{name}={value}" for name, value in info["session_entries"].items())
    return (
        f"{info['processor']} ({' '.join(info['features']) or 'features unknown'}), {info['cores']} cores, onnxruntime "
        f"{info['onnxruntime']}; products of bytes are {products}" + (f" ({entries})" if entries else "")
    )


def versions() -> dict[str, str | None]:
    """Versions of Python, of staticvl, and of each package that an extra of it needs, tests left out; None: not installed."""
    needed = {line for line in requires("staticvl") or () if 'extra == "test"' not in line.replace("'", '"')}
    names = {match[0] for line in needed if (match := re.match(r"[\w.-]+", line))}
    packages = {name: _version(name) for name in sorted(names, key=str.lower)}
    return {"python": platform.python_version(), "staticvl": _version("staticvl"), **packages}


def measurement(threads: int | None) -> dict[str, Any]:
    """The circumstances of a measurement: its date (UTC), CPU threads (None: every core), the machine, versions, and the peak
    of this process's resident memory so far, in MB."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "machine": machine(),
        "versions": versions(),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e6, 1),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

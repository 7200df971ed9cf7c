"""A description of this machine for figures and bug reports."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from ..runtime.backends import unsigned_weights
from ..runtime.backends.cores import processor_features, processor_name, usable_cores


def machine() -> dict[str, Any]:
    """The processor's name and features, cores that this process may use, onnxruntime's version, whether the processor's
    products of unsigned by signed bytes are exact, and the session entries that are set where they are not."""
    return {
        "processor": processor_name(),
        "features": list(processor_features()),
        "cores": usable_cores(),
        "onnxruntime": version("onnxruntime"),
        "exact_byte_products": not unsigned_weights.saturates(),
        "session_entries": unsigned_weights.entries(),
    }


def described() -> str:
    """The description in one line."""
    info = machine()
    products = "exact" if info["exact_byte_products"] else "cut off in 16 bits, so weights are unsigned"
    entries = ", ".join(f"{name}={value}" for name, value in info["session_entries"].items())
    return (
        f"{info['processor']} ({' '.join(info['features']) or 'features unknown'}), {info['cores']} cores, onnxruntime "
        f"{info['onnxruntime']}; products of bytes are {products}" + (f" ({entries})" if entries else "")
    )

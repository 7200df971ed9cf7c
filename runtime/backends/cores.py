"""How many cores there are to compute with, and what they call themselves."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(core_numbers())


def core_numbers() -> tuple[int, ...]:
    """Which these are, as the system counts them."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return tuple(range(os.cpu_count() or 1))


def processor_name() -> str:
    """What the processor calls itself."""
    return _told("model name") or platform.processor() or platform.machine()


# What the kernels of matrix products differ by, as Linux names it.
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")


def processor_features() -> tuple[str, ...]:
    """Those of FEATURES that the processor has; none where the system does not list them."""
    listed = set((_told("flags") or _told("Features")).split())
    return tuple(name for name in FEATURES if name in listed)


def _told(what: str) -> str:
    """What Linux says of the first core; empty elsewhere."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(what):
                return line.partition(":")[2].strip()
    return ""

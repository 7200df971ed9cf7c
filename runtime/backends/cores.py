"""The processor: the cores that this process may use, its name, and its features."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(core_numbers())


def core_numbers() -> tuple[int, ...]:
    """The numbers of those cores, as the system counts them."""
    try:
        return tuple(sorted(os.sched_getaffinity(0)))
    except AttributeError:  # not Linux
        return tuple(range(os.cpu_count() or 1))


def processor_name() -> str:
    """The name of the processor's model."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


# Features on which kernels of matrix products depend, by their names in Linux.
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16")


def processor_features() -> tuple[str, ...]:
    """Those of FEATURES that the processor has; none where the system does not list them."""
    flags = set((_cpu_info("flags") or _cpu_info("Features")).split())
    return tuple(name for name in FEATURES if name in flags)


def _cpu_info(field: str) -> str:
    """A field of /proc/cpuinfo for the first core; empty on other systems than Linux."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return ""

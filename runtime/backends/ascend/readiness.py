"""A check that a device for Ascend graphs is there, without opening it.

Commands check before they compile, convert or compare for minutes. torch_npu is never imported here: a process that has
imported it can compile nothing, since torchair's stand-ins and the device exclude each other.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from ...artifact import ArtifactError
from ...shown import quoted
from . import torchair_host

_COUNT = "import torch_npu; print('cards:', torch_npu.npu.device_count())"


def check_ready(device: str) -> None:
    """Raises ArtifactError, which says what is missing, unless graphs can run on "npu", "npu:1", "sim" or "sim:float32"."""
    if importlib.util.find_spec("torch") is None:
        raise ArtifactError("Ascend artifacts need torch; install it with: pip install 'staticvl[compile]'")
    if device.startswith("sim"):
        torchair_host.wheel_folder()
        return
    index = card_index(device)
    if importlib.util.find_spec("torch_npu") is None:
        raise ArtifactError(missing(device))
    process = subprocess.run([sys.executable, "-c", _COUNT], capture_output=True, text=True, check=False)
    counts = [line.removeprefix("cards: ") for line in process.stdout.splitlines() if line.startswith("cards: ")]
    if not counts:
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise ArtifactError(
            f"device {device} needs torch_npu, which cannot be imported here ({lines[-1]:.200}); see `npu-smi info`"
        )
    if index >= int(counts[0]):
        raise ArtifactError(f"device {device} was requested, but torch_npu sees {counts[0]} Ascend cards; see `npu-smi info`")


def card_index(device: str) -> int:
    """1 of "npu:1", 0 of "npu"; raises ArtifactError for anything else."""
    kind, colon, number = device.partition(":")
    if kind != "npu" or (colon and not (number.isascii() and number.isdigit())):
        raise ArtifactError(f"device {quoted(device)} is unknown; expected npu, or npu:1 for the second card")
    return int(number or 0)


def missing(device: str) -> str:
    """The error text where torch_npu is not installed."""
    return f"device {device} needs torch_npu, which is not installed: pip install torch_npu=={torchair_host.VERSION}"

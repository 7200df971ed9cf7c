"""The prompts of a calibration: conversations with images, and a digest of them. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..runtime.processor.prompt import Message

if TYPE_CHECKING:
    from ..runtime.processor.images import ImageSource

METHODS = {
    "w4a16": "GPTQ",
    "w4a16-g32": "GPTQ",
    "w8a8": "SmoothQuant",
    "w8a8+vision": "SmoothQuant",
}  # by quantisation; others have no weights to calibrate
CACHE_METHOD = "largest keys and values"  # of a cache in 8 bits


class CalibrationError(ValueError):
    """Prompts that cannot be used for a calibration; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of a chat, answers of the model included where there are any, and its images in order."""

    name: str  # for messages
    messages: tuple[Message, ...]
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Calibration:
    """All conversations of a calibration. `sha256` is of the file and of all images that it names."""

    conversations: tuple[Conversation, ...]
    sha256: str

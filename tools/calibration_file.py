"""`staticvl compile --calibrate FILE`: the file -> the prompts of a calibration. Its formats are those of `compare --data`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..compiler.calibration import Calibration, CalibrationError, Conversation
from ..runtime.files import sha256_file
from ..runtime.processor.prompt import Message
from ..runtime.shown import shown
from .questions.read import read_data
from .questions.samples import Sample


def read_calibration(path: Path) -> Calibration:
    """Every prompt of a file, with its answer where the file has one; images lie beside it.

    Raises CalibrationError for a missing file, DataError with file and line for one that cannot be used.
    """
    if not path.is_file():
        raise CalibrationError(
            f"--calibrate {shown(path)} is no file; expected JSON lines such as "
            '{"prompt": "What is this?", "images": ["a.jpg"]}'
        )
    samples = list(_longest(read_data(path)))
    digest = hashlib.sha256(path.read_bytes())
    for sample in samples:
        for image in sample.images:
            digest.update(hashlib.sha256(image).digest() if isinstance(image, bytes) else bytes.fromhex(sha256_file(image)))
    return Calibration(tuple(map(_conversation, samples)), digest.hexdigest())


def _longest(samples: Sequence[Sample]) -> Iterator[Sample]:
    """The samples that are not a prefix of the next one: a conversation gives a sample for each answer."""
    for sample, after in zip(samples, (*samples[1:], None), strict=True):
        if (
            after is None
            or after.messages[: len(sample.messages)] != sample.messages
            or len(after.messages) <= len(sample.messages)
        ):
            yield sample


def _conversation(sample: Sample) -> Conversation:
    answer = sample.answer or sample.expected
    reply = (Message("assistant", answer),) if answer else ()
    return Conversation(sample.name, (*sample.messages, *reply), tuple(sample.images))

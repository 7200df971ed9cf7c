"""A file of questions -> samples. The keys of a record say what it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...runtime.shown import quoted, shown
from . import benchmarks, conversations, prompts
from .records import Location, read_records
from .samples import DataError, Sample

Reader = Callable[[Mapping[str, Any], Location], list[Sample]]
# Keys that a record has to have, and its reader; the first that fits counts.
READERS: tuple[tuple[tuple[str, ...], Reader], ...] = (
    (("conversations",), conversations.conversation),
    (("messages",), conversations.messages),
    (("body",), conversations.messages),
    (("prompt",), prompts.prompt),
    (("doc", "target"), benchmarks.lmms_sample),
    (("question_id", "text"), prompts.llava_bench),
    (("index", "question"), benchmarks.vlmeval),
    (("question", "image_id"), benchmarks.vqa),
    (("question", "question_id"), benchmarks.vqa),
)


def read_data(path: Path, image_folder: Path | None = None) -> list[Sample]:
    """Every sample of a file; images lie beside it or in `image_folder`. Raises DataError with file and line."""
    folder = image_folder or path.parent
    samples = [each for record, location in read_records(path, folder) for each in _samples(record, location)]
    if not samples:
        raise DataError(f'{path} holds no samples; write one JSON object a line, e.g. {{"prompt": "What is this?"}}')
    return samples


def _samples(record: Any, location: Location) -> list[Sample]:
    if not isinstance(record, Mapping):
        raise location.error(f'{quoted(record)} is no object; expected {{"prompt": ...}} or {{"conversations": ...}}')
    for keys, read in READERS:
        if set(keys) <= set(record):
            return read(record, location)
    raise location.error(
        f"neither prompt nor conversations among {shown(', '.join(map(str, record))) or 'no keys'}; add one of them, or use a "
        "format of docs/comparing.md"
    )

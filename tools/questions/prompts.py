"""Records of one prompt: ours, those of `bench --requests`, and the questions of LLaVA-bench.

{"prompt": "...", "images": ["a.jpg"], "answer": "...", "expected": "...", "boxes": [[x1, y1, x2, y2]]}
{"prompt": "...", "images": ["a.jpg"], "max_new_tokens": 64, "time": 0.5}
{"question_id": 0, "image": "a.jpg", "text": "...", "category": "..."}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.shown import shown
from .records import Location
from .samples import Sample, user_sample

PROMPT_KEYS = ("prompt", "image", "images", "answer", "expected", "boxes", "id")
BENCH_KEYS = ("max_new_tokens", "time")  # say nothing about the question


def prompt(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A record with the key prompt."""
    if unknown := sorted(set(record) - {*PROMPT_KEYS, *BENCH_KEYS}):
        raise location.error(f"unknown keys {shown(', '.join(unknown))}; expected {', '.join(PROMPT_KEYS)}")
    keys = ("prompt", "answer", "expected")
    texts = {key: location.text(record[key], key) for key in keys if record.get(key) is not None}
    images = images_of(record, location)
    text = texts.pop("prompt", None)
    if text is None:
        raise location.error("prompt is null; expected text")
    if texts.get("answer") == "":
        raise location.error("answer is empty; leave it out to use the reference's own")
    boxes = location.boxes(record.get("boxes"))
    return [user_sample(name_of(record, location), text, images, boxes=boxes, **texts)]


def llava_bench(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A question of LLaVA-bench: no answer is right alone, so there is none to match."""
    text = location.text(record["text"], "text").replace("<image>\n", "").replace("<image>", "")
    return [user_sample(name_of(record, location), text, images_of(record, location))]


def name_of(record: Mapping[str, Any], location: Location) -> str:
    """The name of a record's sample."""
    key = next((key for key in ("id", "question_id", "index", "doc_id", "custom_id") if record.get(key) is not None), None)
    return f"line {location.line}" if key is None else str(record[key])


def images_of(record: Mapping[str, Any], location: Location) -> tuple[Path | bytes, ...]:
    """The images of a record's key image or images."""
    if record.get("image") is not None and record.get("images") is not None:
        raise location.error("both image and images are given; leave one out")
    value = record.get("image") if record.get("images") is None else record["images"]
    names = [] if value is None else value if isinstance(value, list) else [value]
    return tuple(location.image(name) for name in names)

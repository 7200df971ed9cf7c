"""Records of the files of benchmarks: VLMEvalKit's tables, samples that lmms-eval has logged, and VQA's questions.

index  image (base64) or image_path  question  hint  A  B  C  D  answer  category
{"doc_id": 0, "doc": {"question": "..."}, "input": "...", "target": "...", "resps": [...]}
{"questions": [{"image_id": 1, "question": "...", "question_id": 1}]}, also under "annotations", with answers
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.shown import shown
from .prompts import images_of, name_of
from .records import Location
from .samples import Sample, user_sample

CHOICE = "Please select the correct answer from the options above."
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
COCO = ("COCO_val2014_{:012d}", "COCO_train2014_{:012d}", "COCO_test2015_{:012d}", "{:012d}")  # files of VQA's images by id


def vlmeval(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A row of a table; with options, the question asks for their letter, as VLMEvalKit does."""
    options = {letter: record[letter] for letter in string.ascii_uppercase if record.get(letter) is not None}
    lines = [f"Hint: {record['hint']}"] if record.get("hint") else []
    lines.append(f"Question: {record['question']}" if options or lines else record["question"])
    if options:
        lines += ["Options:", *(f"{letter}. {text}" for letter, text in options.items()), CHOICE]
    images: tuple[Path | bytes, ...] = ()
    if record.get("image"):
        images = (location.base64(record["image"]),)
    elif record.get("image_path"):
        images = (location.file(record["image_path"]),)
    return [user_sample(name_of(record, location), "\n".join(lines), images, expected=record.get("answer"))]


def lmms_sample(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A logged sample. Its images are not in the log; a path that `doc` has as image or image_path is read."""
    doc = record["doc"] if isinstance(record["doc"], Mapping) else {}
    text = record.get("input") or doc.get("question")
    text = location.text(text, "input").strip()
    path = next((doc[key] for key in ("image", "image_path") if isinstance(doc.get(key), str)), None)
    images = () if path is None else (location.image(path),)
    if "<image>" in text:
        if not images:
            raise location.error("input has an <image> mark, but the log holds no image; give its path as doc.image")
        text = text.replace("<image>\n", "").replace("<image>", "").strip()
    target = record.get("target")
    expected = str(target[0] if isinstance(target, list) and target else target) if target is not None else None
    return [user_sample(name_of(record, location), text, images, expected=expected)]


def vqa(record: Mapping[str, Any], location: Location) -> list[Sample]:
    """A question about an image that is named by its id."""
    text = location.text(record["question"], "question")
    images = images_of(record, location)
    if not images and record.get("image_id") is not None:
        images = (_by_id(record["image_id"], location),)
    return [user_sample(name_of(record, location), text, images, expected=_right_answer(record))]


def _by_id(number: Any, location: Location) -> Path:
    """The image of an id: the file that the list of images gives, or one with the names of COCO, or with the id alone."""
    if str(number) in location.images:
        return location.file(location.images[str(number)])
    stems = [str(number)]
    stems += [form.format(number) for form in COCO] if isinstance(number, int) else []
    for stem in stems:
        for ending in ENDINGS:
            path = location.folder / f"{stem}{ending}"
            if path.is_file():
                return path
    raise location.error(
        f"no image of the id {shown(number)} is in {shown(location.folder)}; expected e.g. {shown(stems[-1])}.jpg, or give "
        "--image-folder"
    )


def _right_answer(record: Mapping[str, Any]) -> str | None:
    """The answer that most people gave."""
    if isinstance(record.get("multiple_choice_answer"), str):
        return record["multiple_choice_answer"]
    if isinstance(record.get("answer"), str):
        return record["answer"]
    answers = record.get("answers")
    texts = [each.get("answer") if isinstance(each, Mapping) else each for each in answers] if isinstance(answers, list) else []
    counted = Counter(text for text in texts if isinstance(text, str)).most_common(1)
    return counted[0][0] if counted else None

"""Records of a file with the lines that they begin in: JSON lines, a list, an object that holds one, or a TSV table."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...runtime.processor.image_data import ImageError, decode_base64, decode_data_url, is_data_url
from ...runtime.shown import quoted, shown
from .samples import Box, DataError

LISTS = ("annotations", "questions", "samples", "data")  # keys of an object under which VQA's files and others hold a list
MOST_BYTES = 32 << 20  # of one image that is written as text


@dataclass(frozen=True, slots=True)
class Location:
    """A line of a file, for errors that name both, and the folder of its images. `images`: the file of an image by its id."""

    path: Path
    line: int
    folder: Path
    images: Mapping[str, str] = field(default_factory=dict)

    def error(self, text: str) -> DataError:
        return DataError(f"{self.path}, line {self.line}: {text}")

    def file(self, name: Any) -> Path:
        """An image in the folder; raises DataError where it is not there."""
        if not isinstance(name, str):
            raise self.error(f"an image is {quoted(name)}; expected the path of a file")
        path = self.folder / name.removeprefix("file://")
        if not path.is_file():
            raise self.error(f"the image {shown(path)} is not there; paths are relative to the file, or to --image-folder")
        return path

    def image(self, value: Any) -> Path | bytes:
        """An image: a path, or a data: URL."""
        if isinstance(value, str) and is_data_url(value):
            return self._decoded(value, decode_data_url)
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            raise self.error(f"the image {shown(value)} is a URL; download it, and write its path here")
        return self.file(value)

    def base64(self, value: Any) -> bytes:
        """An image in base64."""
        if not isinstance(value, str):
            raise self.error(f"an image is {quoted(value)}; expected base64")
        return self._decoded(value, lambda text, most: decode_base64(text, "the image", most))

    def _decoded(self, text: str, decode: Any) -> bytes:
        try:
            return decode(text, MOST_BYTES)
        except ImageError as error:
            raise self.error(str(error)) from None

    def text(self, value: Any, name: str) -> str:
        """A text; raises DataError for anything else."""
        if not isinstance(value, str):
            raise self.error(f"{name} is {quoted(value)}; expected text")
        return value

    def boxes(self, value: Any) -> tuple[Box, ...]:
        """Boxes as fractions of an image; none for None."""
        if value is None:
            return ()
        if not isinstance(value, list) or not value or not all(_is_box(box) for box in value):
            raise self.error(
                f"boxes is {quoted(value)}; expected a list of [x1, y1, x2, y2] as fractions of the image, x1 <= x2 and "
                "y1 <= y2"
            )
        return tuple((float(x1), float(y1), float(x2), float(y2)) for x1, y1, x2, y2 in value)


def read_records(path: Path, folder: Path) -> Iterator[tuple[Any, Location]]:
    """Every record of a file; raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from None
    if path.suffix.lower() == ".tsv":
        yield from _table(text, path, folder)
    elif text.lstrip().startswith("["):
        yield from _listed(text, path, folder, text.index("[") + 1, {})
    elif inner := _list_in_object(text):
        yield from _listed(text, path, folder, *inner)
    else:
        yield from _lines(text, path, folder)


def _lines(text: str, path: Path, folder: Path) -> Iterator[tuple[Any, Location]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        location = Location(path, number, folder)
        try:
            yield json.loads(line), location
        except json.JSONDecodeError as error:
            raise location.error(f"not JSON ({error.msg}, column {error.colno}); write one object a line") from None


def _list_in_object(text: str) -> tuple[int, dict[str, str]] | None:
    """The place after the bracket of a list that an object of the whole file holds, and its images' files by id."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    key = next((key for key in LISTS if isinstance(whole, dict) and isinstance(whole.get(key), list)), None)
    if key is None:
        return None
    entries = whole.get("images")
    entries = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    files = {str(each.get("id")): str(each["file_name"]) for each in entries if "file_name" in each}
    return text.index("[", text.index(f'"{key}"')) + 1, files


def _listed(text: str, path: Path, folder: Path, position: int, images: Mapping[str, str]) -> Iterator[tuple[Any, Location]]:
    decoder = json.JSONDecoder()
    while True:
        position = _after(text, position, " \t\r\n,")
        if position == len(text) or text[position] == "]":
            return
        location = Location(path, text.count("\n", 0, position) + 1, folder, images)
        try:
            record, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise Location(path, error.lineno, folder).error(f"not JSON ({error.msg}); check the list") from None
        yield record, location


def _after(text: str, position: int, characters: str) -> int:
    """The first position from `position` on that holds none of these characters."""
    while position < len(text) and text[position] in characters:
        position += 1
    return position


def _table(text: str, path: Path, folder: Path) -> Iterator[tuple[Any, Location]]:
    """Rows as objects by the names in the first line; cells that are empty are left out."""
    csv.field_size_limit(max(csv.field_size_limit(), 2 * MOST_BYTES))
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    for row in reader:
        location = Location(path, reader.line_num, folder)
        if None in row:
            raise location.error("it has more cells than the first line has names; separate cells by tabs")
        yield {name: value for name, value in row.items() if value not in (None, "")}, location


def _is_box(value: Any) -> bool:
    def is_share(number: Any) -> bool:
        return isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number <= 1

    four = isinstance(value, list) and len(value) == 4 and all(map(is_share, value))
    return four and value[0] <= value[2] and value[1] <= value[3]

"""Requests from rows of a trace, whose columns may have many names.

Names are compared without case and punctuation, so ContextTokens, context_tokens and "context tokens" are one name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...runtime.shown import quoted, shown
from .time_units import TimeReader
from .trace_error import TraceError

MOST_TOKENS = 1 << 20  # of one request; more is taken for an error in the trace
MOST_IMAGES = 1 << 10
# By meaning: names of its column, of which the first that a trace has is used. Each is that of a public trace or of the
# interface of a serving system.
NAMES: dict[str, str] = {
    "prompt": "prompttokens contexttokens inputtokens texttokens prompttokencount inputtokencount numprompttokens "
    "numinputtokens numberinputtokens inputlength inputlen inputlens inputtoks isl inputsequencelength promptlength promptlen "
    "promptlens promptsize numprefilltokens prefilltokens requesttokens promptevalcount tokensevaluated promptn "
    "genaiusageinputtokens genaiusageprompttokens input",
    "generated": "generated generatedtokens outputtokens completiontokens responsetokens generatedtokencount outputtokencount "
    "candidatestokencount numgeneratedtokens numoutputtokens numberoutputtokens outputlength outputlen outputlens outputtoks "
    "osl outputsequencelength numdecodetokens decodetokens tokensize evalcount tokenspredicted predictedn "
    "genaiusageoutputtokens genaiusagecompletiontokens output",
    "time": "timestamp time arrivaltime arrivedat arrival arrived arrivaltimestamp starttime timestampms arrivaltimems "
    "arrivaltimens requeststartns starttimestamps starttimeunixnano created createdat createtime",
    "images": "imagesizes imageresolutions imagedimensions numimages imagecount imagenum images",
    "image_size": "imagesize imageresolution",
    "image_tokens": "imagetokens numimagetokens visiontokens",
    "reused": "reusedtokens cachedtokens",
}
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+")
_SIZE = re.compile(r"\s*(\d+)\s*[x*×]\s*(\d+)\s*")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace.

    `prompt`: tokens of text. `images`: their number; `sizes`: (width, height) of those whose size is known. `image_tokens`:
    tokens of all images, None where the trace does not say. `time`: in seconds, from any origin, None where not known.
    """

    prompt: int
    generated: int
    time: float | None = None
    images: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    image_tokens: int | None = None
    reused: int = 0


def has_columns(names: Iterable[str], chosen: Mapping[str, str]) -> bool:
    """Whether names have a column for prompts and one for answers."""
    return _has_columns(tuple(names), tuple(chosen.items()))


@lru_cache(maxsize=1000)
def _has_columns(names: tuple[str, ...], chosen: tuple[tuple[str, str], ...]) -> bool:
    return {"prompt", "generated"} <= match_columns(names, "", dict(chosen), ambiguous=True).keys()


def find_columns(names: Iterable[str], where: str, chosen: Mapping[str, str] | None = None) -> dict[str, str]:
    """The name of the column of each meaning; raises TraceError where there is none for prompts or for answers.

    `chosen`: names by meaning that precede the known ones; each has to be there.
    """
    names, chosen = list(names), chosen or {}
    columns = match_columns(names, where, chosen)
    there = shown(", ".join(map(str, names)) or "none")
    if missing := [name for meaning, name in chosen.items() if meaning not in columns]:
        raise TraceError(f"{where}: --columns names {quoted(missing[0])}, but there are {there}")
    for meaning, examples in (("prompt", "ContextTokens or prompt_tokens"), ("generated", "GeneratedTokens or generated")):
        if meaning not in columns:
            raise TraceError(
                f"{where}: no column says how many tokens the {'prompts' if meaning == 'prompt' else 'answers'} have; "
                f"there are {there}; name one {examples}, or give --columns prompt=NAME,output=NAME"
            )
    return columns


def match_columns(names: Iterable[str], where: str, chosen: Mapping[str, str], *, ambiguous: bool = False) -> dict[str, str]:
    """Names of columns by meaning, as far as there are any. A known name may be the last part of a.b.c; that with the fewest
    parts is taken. Raises TraceError where several have as few, unless `ambiguous`.
    """
    whole: dict[str, str] = {}
    ends: dict[str, list[str]] = {}
    for name in (name for name in names if isinstance(name, str)):
        whole[_plain(name)] = name
        if "." in name:
            ends.setdefault(_plain(name.rsplit(".", 1)[1]), []).append(name)
    columns = {}
    for meaning, known in NAMES.items():
        words = [_plain(chosen[meaning])] if meaning in chosen else known.split()
        word = next((word for word in words if word in whole or word in ends), None)
        if word is not None:
            columns[meaning] = whole.get(word) or _shallowest(ends[word], where, ambiguous)
    return columns


def _shallowest(names: list[str], where: str, ambiguous: bool) -> str:
    least = min(name.count(".") for name in names)
    first, *others = (name for name in names if name.count(".") == least)
    if others and not ambiguous:
        raise TraceError(f"{where}: {quoted(first)} and {quoted(others[0])} may both be meant; name one with --columns")
    return first


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_row(row: Mapping[str, Any], columns: Mapping[str, str], times: TimeReader, where: str) -> Request:
    """A request from a row; raises TraceError."""
    value = {meaning: row.get(name) for meaning, name in columns.items()}
    images, sizes = _images(value.get("images"), where)
    if value.get("image_size") not in (None, "") and not sizes:
        images = images if value.get("images") not in (None, "") else 1
        sizes = (_size(value["image_size"], where),) * images
    generated = _count(value["generated"], "generated tokens", where, least=0)
    prompt = _count(value["prompt"], "prompt tokens", where, least=0)
    image_tokens = value.get("image_tokens")
    if prompt == 0 and generated and not images and not image_tokens:
        raise TraceError(f"{where}: the request has no prompt tokens and no images; expected at least one token")
    return Request(
        prompt=prompt,
        generated=generated,
        time=None if value.get("time") in (None, "") else times.seconds(value["time"], columns["time"], where),
        images=images,
        sizes=sizes,
        image_tokens=None if image_tokens in (None, "") else _count(image_tokens, "image tokens", where, least=0),
        reused=_count(value.get("reused") or 0, "reused tokens", where, least=0),
    )


def _count(value: Any, name: str, where: str, *, least: int, most: int = MOST_TOKENS) -> int:
    if isinstance(value, str) and _THOUSANDS.fullmatch(value.strip()):
        value = value.replace(",", "")
    try:
        number = float(value) if isinstance(value, str) else value
        integer = int(number)
    except (TypeError, ValueError, OverflowError):
        raise TraceError(f"{where}: {name} is {quoted(value)}; expected a whole number") from None
    if isinstance(value, bool) or integer != number or integer < least:
        raise TraceError(f"{where}: {name} is {quoted(value)}; expected a whole number of at least {least}")
    if integer > most:
        raise TraceError(f"{where}: {name} is {quoted(value)}, more than {most}; correct the trace or take the line out")
    return integer


def _images(value: Any, where: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The number of images, and their sizes where the trace has them: 2, "640x480;800x600", [[640, 480], [800, 600]]."""
    if value in (None, "", []) or value == ():
        return 0, ()
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise TraceError(f"{where}: images are {quoted(value)}; expected a list of sizes such as [[640, 480]]") from None
    if isinstance(value, str) and _SIZE.match(value):
        value = re.split(r"[;,|\s]+", value.strip())
    if isinstance(value, list | tuple):
        if len(value) > MOST_IMAGES:
            raise TraceError(f"{where}: there are {len(value)} images, more than {MOST_IMAGES}; correct the trace")
        sizes = tuple(_size(each, where) for each in value)
        return len(sizes), sizes
    return _count(value, "the number of images", where, least=0, most=MOST_IMAGES), ()


def _size(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        value = [int(match[1]), int(match[2])]
    if isinstance(value, Mapping):
        value = [value.get("width"), value.get("height")]
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise TraceError(f"{where}: the size of an image is {quoted(value)}; expected its width and height, e.g. 640x480")
    width, height = (_count(each, "an edge of an image", where, least=1) for each in value)
    return width, height

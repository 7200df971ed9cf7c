"""The body of POST /v1/chat/completions, as far as staticvl can do what it asks."""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...runtime.shown import shown
from .errors import ApiError

# Of the client's own book-keeping, or without effect here: taken and not looked at.
HARMLESS = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key prompt_cache_retention parallel_tool_calls".split()
)
# Echoed by clients that send an answer back as a message.
ECHOED = frozenset("refusal annotations boxes".split())
REFUSED = {
    "tools": "this server calls no tools",
    "tool_choice": "this server calls no tools",
    "functions": "this server calls no functions",
    "function_call": "this server calls no functions",
    "tool_calls": "this server calls no tools",
    "audio": "answers are text",
    "modalities": "answers are text",
    "prediction": "answers are not predicted",
    "web_search_options": "this server searches nothing",
    "reasoning_effort": "these models do not reason apart from their answers",
}
MOST_SHOWN = 60  # characters of a value that an error repeats
MOST_NAMED = 5  # fields that an error names
MOST_MESSAGES, MOST_PARTS = 4096, 1024  # of a conversation, of a message
MOST_BIASES = 1024
Whole = Annotated[int, Field(lt=2**31)]  # more is a mistake, or meant to take long


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class ImageUrl(_Part):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # every image is cut as its model was trained


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(lambda given: {"url": given} if isinstance(given, str) else given)]


def _parts(given: Any) -> Any:
    if given is None:
        return []
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(max_length=MOST_PARTS, fail_fast=True),
        BeforeValidator(_parts),
    ]
    name: str | None = None

    @property
    def characters(self) -> int:
        return sum(len(part.text) for part in self.content if isinstance(part, TextPart))

    @property
    def urls(self) -> list[str]:
        return [part.image_url.url for part in self.content if isinstance(part, ImagePart)]


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class TextFormat(_Part):
    type: Literal["text"]


class JsonObject(_Part):
    type: Literal["json_object"]


class NamedSchema(_Part):
    name: str | None = None
    description: str | None = None
    form: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class JsonSchema(_Part):
    type: Literal["json_schema"]
    json_schema: NamedSchema


Texts = Annotated[
    list[Annotated[str, Field(max_length=1000)]],
    Field(fail_fast=True),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]


def _few(given: Any) -> Any:
    """Counted before any is looked at: each that is wrong would be written down."""
    if isinstance(given, dict) and len(given) > MOST_BIASES:
        raise ValueError(f"{len(given)} tokens are named; expected at most {MOST_BIASES}")
    return given


class ChatRequest(BaseModel):
    """Left at None, a setting is the checkpoint's, and an answer may be as long as fits."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    max_tokens: Whole | None = Field(None, ge=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Annotated[Texts, Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, BeforeValidator(_few)] = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    response_format: Annotated[TextFormat | JsonObject | JsonSchema, Field(discriminator="type")] | None = None
    # What staticvl can do besides; clients send it as extra_body.
    top_k: Whole | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    min_tokens: Whole | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Annotated[Whole, Field(ge=0)]], Field(max_length=64, fail_fast=True)] | None = None
    regex: str | None = Field(None, max_length=10_000)
    choice: Annotated[Texts, Field(max_length=1000)] | None = None
    deadline_s: float | None = Field(None, gt=0)
    priority: int | None = Field(None, ge=-1000, le=1000)
    speculate: int | None = Field(None, ge=0, le=64)


def read_request(body: bytes) -> ChatRequest:
    """Raises ApiError, status 400, for anything but a request that can be tried."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    _check_unknown(request.model_extra or {}, "", HARMLESS)
    for place, message in enumerate(request.messages):
        _check_unknown(message.model_extra or {}, f"messages[{place}].", ECHOED)
    return request


def _check_unknown(given: dict[str, Any], where: str, allowed: frozenset[str]) -> None:
    unknown = [name for name, value in given.items() if name not in allowed and value is not None and value != []]
    if given.get("modalities") == ["text"]:
        unknown.remove("modalities")
    if not unknown:
        return
    names = ", ".join(where + _shown(name) for name in unknown[:MOST_NAMED])
    if len(unknown) > MOST_NAMED:
        names += f" and {len(unknown) - MOST_NAMED} more"
    why = "; ".join(dict.fromkeys(REFUSED[name] for name in unknown if name in REFUSED))
    raise ApiError(
        400,
        f"the fields {shown(names)} cannot be used{': ' + why if why else ''}; leave them out",
        param=where + _shown(unknown[0]),
        code="unsupported_parameter",
    )


def _explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    param = ""
    for step in first["loc"]:
        param += f"[{step}]" if isinstance(step, int) else f".{_shown(step)}" if param else _shown(step)
    given = "" if first["type"] == "missing" else f"; given: {_shown(first['input'])}"
    return ApiError(400, f"{param or 'the body'}: {first['msg']}{given}", param=param or None, code="invalid_value")


def _shown(value: Any) -> str:
    """The first characters of a value, which may be large."""
    try:
        pieces = [value] if isinstance(value, str) else json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value)
        text = "".join(islice(pieces, MOST_SHOWN))
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."

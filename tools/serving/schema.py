"""The body of POST /v1/chat/completions: the fields that staticvl supports."""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ...runtime.shown import shown
from .errors import ApiError

# Of the client's own book-keeping, or without effect here: accepted and ignored.
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
MAX_SHOWN = 60  # characters of a value that an error repeats
MAX_NAMED = 5  # fields that an error names
MAX_MESSAGES, MAX_PARTS = 4096, 1024  # of a conversation, of a message
MAX_BIASES = 1024
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
    image_url: Annotated[ImageUrl, BeforeValidator(lambda value: {"url": value} if isinstance(value, str) else value)]


def _parts(content: Any) -> Any:
    if content is None:
        return []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class ChatMessage(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(max_length=MAX_PARTS, fail_fast=True),
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
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]


def _few(biases: Any) -> Any:
    """The biases, counted before they are validated, since every invalid one adds to the error."""
    if isinstance(biases, dict) and len(biases) > MAX_BIASES:
        raise ValueError(f"{len(biases)} tokens are named; expected at most {MAX_BIASES}")
    return biases


class ChatRequest(BaseModel):
    """A chat completion request. A setting that is None is the checkpoint's; without max_tokens an answer may fill the
    context."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, allow_inf_nan=False)
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
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
    # Further settings of staticvl; clients send them as extra_body.
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
    """The request in a body; raises ApiError, status 400, for a wrong one."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    _check_unknown(request.model_extra or {}, "", HARMLESS)
    for place, message in enumerate(request.messages):
        _check_unknown(message.model_extra or {}, f"messages[{place}].", ECHOED)
    return request


def _check_unknown(extra: dict[str, Any], where: str, allowed: frozenset[str]) -> None:
    unknown = [name for name, value in extra.items() if name not in allowed and value is not None and value != []]
    if extra.get("modalities") == ["text"]:
        unknown.remove("modalities")
    if not unknown:
        return
    names = ", ".join(where + _shown(name) for name in unknown[:MAX_NAMED])
    if len(unknown) > MAX_NAMED:
        names += f" and {len(unknown) - MAX_NAMED} more"
    reasons = "; ".join(dict.fromkeys(REFUSED[name] for name in unknown if name in REFUSED))
    raise ApiError(
        400,
        f"the fields {shown(names)} cannot be used{': ' + reasons if reasons else ''}; leave them out",
        param=where + _shown(unknown[0]),
        code="unsupported_parameter",
    )


def _explained(error: ValidationError) -> ApiError:
    """The error of the first wrong field."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}", code="invalid_json")
    param = ""
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if param else _shown(part)
    suffix = "" if first["type"] == "missing" else f"; given: {_shown(first['input'])}"
    return ApiError(400, f"{param or 'the body'}: {first['msg']}{suffix}", param=param or None, code="invalid_value")


def _shown(value: Any) -> str:
    """The first characters of a value, which may be large."""
    try:
        pieces = [value] if isinstance(value, str) else json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value)
        text = "".join(islice(pieces, MAX_SHOWN))
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."

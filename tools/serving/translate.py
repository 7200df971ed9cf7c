"""Translation of a request of OpenAI's API into messages, image URLs and sampling parameters."""

from __future__ import annotations

from typing import Any

from ...runtime.engine.request import SamplingParams
from ...runtime.processor.prompt import IMAGE, Message
from ...runtime.shown import quoted
from .errors import ApiError
from .schema import ChatMessage, ChatRequest, JsonObject, JsonSchema, TextPart
from .settings import Settings


def check_request(request: ChatRequest, settings: Settings, context: int, places: int) -> None:
    """Raise ApiError for a request that can be refused before any work.

    `context`: the artifact's, in tokens; `places`: the limit of answers at once.
    """
    if request.model != settings.model_name:
        error = f"the model {quoted(request.model)} is not served here; expected {quoted(settings.model_name)}"
        raise ApiError(404, error, param="model", code="model_not_found")
    for place, message in enumerate(request.messages):
        if message.urls and message.role != "user":
            error = f"a message of the role {message.role} has an image; put images into messages of the user"
            raise ApiError(400, error, param=f"messages[{place}].content", code="invalid_value")
    if (count := sum(len(message.urls) for message in request.messages)) > settings.max_images:
        error = f"{count} images were sent; expected at most {settings.max_images}"
        raise ApiError(400, error, param="messages", code="too_many_images")
    chars, most = sum(message.characters for message in request.messages), context * settings.max_chars_per_token
    if chars > most:
        error = f"the messages have {chars} characters, more than the {most} that can fit a context of {context} tokens"
        raise ApiError(400, error, param="messages", code="context_length_exceeded")
    if request.n and request.n > places:
        error = f"n is {request.n}, but this server holds at most {places} answers at once; give a smaller n"
        raise ApiError(400, error, param="n", code="invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs was given without logprobs; set logprobs to true", param="top_logprobs")
    if request.stream_options and not request.stream:
        raise ApiError(400, "stream_options was given without stream; set stream to true", param="stream_options")
    if request.max_tokens and request.max_completion_tokens:
        error = "max_tokens and max_completion_tokens were given; expected one of them"
        raise ApiError(400, error, param="max_tokens")


def messages_of(request: ChatRequest) -> tuple[list[Message], list[str]]:
    """The conversation, its parts in the order of the request, and the URLs of its images in order."""
    return [_message(each) for each in request.messages], [url for each in request.messages for url in each.urls]


def _message(message: ChatMessage) -> Message:
    parts = [part.text if isinstance(part, TextPart) else IMAGE for part in message.content]
    return Message("system" if message.role == "developer" else message.role, parts or "")


def sampling_of(request: ChatRequest, tokens_left: int, seconds: float) -> SamplingParams:
    """Sampling parameters. `tokens_left`: that fit after the prompt. `seconds`: that are left of the time for a request.

    Raises ValueError for settings that contradict each other.
    """
    options: dict[str, Any] = {
        "min_new_tokens": request.min_tokens,
        "temperature": request.temperature,
        "top_k": None if request.top_k is None else max(request.top_k, 0),
        "top_p": request.top_p,
        "min_p": request.min_p,
        "seed": None if request.seed is None else request.seed % 2**64,
        "n": request.n,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": _biases(request.logit_bias or {}),
        "stop": request.stop,
        "stop_token_ids": request.stop_token_ids,
        "ignore_eos": request.ignore_eos,
        "logprobs": (request.top_logprobs or 0) if request.logprobs else None,
        "json_schema": _schema(request),
        "regex": request.regex,
        "choice": request.choice,
        "priority": request.priority,
        "speculate": request.speculate,
    }
    return SamplingParams(
        max_new_tokens=request.max_completion_tokens or request.max_tokens or max(tokens_left, 1),
        deadline_s=min(seconds, request.deadline_s or seconds),
        **{name: value for name, value in options.items() if value is not None},
    )


def _schema(request: ChatRequest) -> dict[str, Any] | None:
    match request.response_format:
        case JsonSchema(json_schema=named):
            return named.form
        case JsonObject():
            return {"type": "object"}
    return None


def _biases(logit_bias: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in logit_bias.items()}
    except ValueError:
        error = f'logit_bias has the keys {", ".join(logit_bias)[:100]}; expected token ids, such as {{"42": -1}}'
        raise ApiError(400, error, param="logit_bias", code="invalid_value") from None

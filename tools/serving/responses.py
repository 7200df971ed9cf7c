"""Responses of OpenAI's API: bodies, and the chunks of a stream."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ...runtime.async_engine import Piece
from ...runtime.engine.request import Output
from ...runtime.processor.token_bytes import TokenBytes
from ...runtime.sampling.sampler import TokenLogprob

# A deadline cuts an answer short as a limit of tokens does; after a dead end its constraint allows no more.
REASONS = {"stop": "stop", "length": "length", "deadline": "length", "dead_end": "stop", "cancelled": "stop"}


class ResponseWriter:
    """A writer of one request's answers; `tokens` is needed for log-probabilities."""

    def __init__(self, model: str, tokens: TokenBytes | None, ends: Iterable[int]) -> None:
        self.model, self.tokens, self.ends = model, tokens, frozenset(ends)
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def completion(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": out.text, "refusal": None},
                "logprobs": self._logprobs(out.logprobs),
                **_ending(out),
            }
            for index, out in enumerate(outputs)
        ]
        return self._envelope("chat.completion", choices) | {"usage": usage(outputs)}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._chunk(index, {"content": piece.text}, self._logprobs(piece.logprobs or None))

    def has_content(self, piece: Piece) -> bool:
        """Whether a piece is more than the token that ends the answer."""
        return bool(piece.text) or any(each.token_id not in self.ends for each in piece.logprobs)

    def last_chunk(self, index: int, out: Output) -> dict[str, Any]:
        """The last chunk of an answer."""
        chunk = self._chunk(index, {})
        chunk["choices"][0] |= _ending(out)
        return chunk

    def usage(self, outputs: Sequence[Output]) -> dict[str, Any]:
        """The chunk after all answers, with the usage, where the request has it."""
        return self._envelope("chat.completion.chunk", []) | {"usage": usage(outputs)}

    def _chunk(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._envelope("chat.completion.chunk", [choice])

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        """Log-probabilities of the tokens of the text, without the one that ends the answer."""
        if logprobs is None:
            return None
        content = [
            self._token(each.token_id, each.logprob) | {"top_logprobs": [self._token(*pair) for pair in each.top]}
            for each in logprobs
            if each.token_id not in self.ends
        ]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        table = self.tokens.tokens if self.tokens else []
        data = table[token_id] if token_id < len(table) else b""
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def usage(outputs: Sequence[Output]) -> dict[str, Any]:
    """Tokens of a prompt and all its answers."""
    first, generated = outputs[0], sum(len(out.token_ids) for out in outputs)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": first.prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": first.reused_tokens, "image_tokens": first.image_tokens},
    }


def _ending(out: Output) -> dict[str, Any]:
    """The reason why an answer ended, in the API's words and in ours, and the boxes in it."""
    return {
        "finish_reason": REASONS[out.finish_reason],
        "finish_detail": out.finish_reason,
        "boxes": [dataclasses.asdict(box) for box in out.boxes],
    }

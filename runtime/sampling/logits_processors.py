"""Logits processors: bias, penalties, and forbidden tokens, applied to a request's logits before a token is chosen.

V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

import numpy as np

from ..artifact import SamplingDefaults
from ..processor.prompt import Prompt
from .bans import bans_of
from .params import SamplingParams

DEFAULTS = SamplingDefaults()


class Constraint(Protocol):
    """A rule that forbids next tokens, from the tokens so far."""

    def forbid(self, row: np.ndarray) -> None:
        """Set the logits [V] of tokens that must not come next to -inf."""
        ...

    def accept(self, token: int) -> None:
        """This token was chosen."""
        ...

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing may follow."""
        ...


class LogitsProcessors:
    """The logits processors of one answer, which know its tokens so far."""

    def __init__(
        self, params: SamplingParams, prompt: Prompt, ends: Iterable[int], vocab: int, constraints: tuple[Constraint, ...]
    ) -> None:
        """`ends`: tokens that end the answer, which are forbidden before min_new_tokens."""
        self.params, self.constraints = params, constraints
        self.ends = np.array(sorted(ends), np.int64)
        self.bias = np.array(list(params.logit_bias), np.int64), np.array(list(params.logit_bias.values()), np.float32)
        # Penalties touch few tokens, so these are kept by id: a pass over the vocabulary takes longer than all else here.
        tokens = prompt.token_ids[prompt.rows < 0]
        self.seen = np.unique(tokens[tokens < vocab])  # of the prompt or the answer; the mark of an image may have no logit
        self.counts = np.zeros(vocab, np.int32)  # of the tokens of the answer
        self.answer = np.empty(0, np.int64)  # those that are in it
        self.generated = 0
        self.changes = changes_for(params, constraints)

    def applied(self, logits: np.ndarray) -> np.ndarray:
        """A changed copy of logits [V]."""
        row = logits.copy()
        for change in self.changes:
            change(self, row)
        return row

    def accept(self, token: int) -> None:
        if not self.counts[token]:
            self.answer = np.append(self.answer, token)
            self.seen = np.union1d(self.seen, token)
        self.counts[token] += 1
        self.generated += 1
        for constraint in self.constraints:
            constraint.accept(token)

    @property
    def done(self) -> bool:
        return any(constraint.done for constraint in self.constraints)

    def _add_bias(self, row: np.ndarray) -> None:
        ids, values = self.bias
        row[ids] += values

    def _penalise_repetition(self, row: np.ndarray) -> None:
        penalty = np.float32(self.params.repetition_penalty)
        logits = row[self.seen]
        row[self.seen] = np.where(logits > 0, logits / penalty, logits * penalty)

    def _penalise_counts(self, row: np.ndarray) -> None:
        row[self.answer] -= np.float32(self.params.frequency_penalty) * self.counts[self.answer]
        row[self.answer] -= np.float32(self.params.presence_penalty)

    def _forbid_ends(self, row: np.ndarray) -> None:
        if self.generated < self.params.min_new_tokens:
            row[self.ends] = -np.inf

    def _apply_constraints(self, row: np.ndarray) -> None:
        for constraint in self.constraints:
            constraint.forbid(row)


_Change = Callable[[LogitsProcessors, np.ndarray], None]
# In the order in which they apply: whether a request asks for a change, and the change.
_CHANGES: tuple[tuple[Callable[[SamplingParams], object], _Change], ...] = (
    (lambda params: params.logit_bias, LogitsProcessors._add_bias),
    (lambda params: params.repetition_penalty not in (None, 1), LogitsProcessors._penalise_repetition),
    (lambda params: params.presence_penalty or params.frequency_penalty, LogitsProcessors._penalise_counts),
    (lambda params: params.min_new_tokens, LogitsProcessors._forbid_ends),
)


def changes_for(params: SamplingParams, constraints: tuple[Constraint, ...]) -> list[_Change]:
    return [change for asks, change in _CHANGES if asks(params)] + [LogitsProcessors._apply_constraints] * bool(constraints)


def logits_processors_for(
    params: SamplingParams,
    prompt: Prompt,
    ends: Iterable[int],
    vocab: int,
    constraints: tuple[Constraint, ...],
    defaults: SamplingDefaults = DEFAULTS,
) -> LogitsProcessors | None:
    """The logits processors that a request needs, those of its checkpoint included; None where there are none.

    Raises ValueError for a token id that the model does not have.
    """
    if unknown := [token for token in (*params.logit_bias, *params.stop_token_ids) if token >= vocab]:
        raise ValueError(f"token {unknown[0]} is named in logit_bias or stop_token_ids; the model has {vocab} tokens")
    params = replace(params, repetition_penalty=params.penalty(defaults))
    constraints = (*constraints, *bans_of(defaults, prompt, vocab))
    return LogitsProcessors(params, prompt, ends, vocab, constraints) if changes_for(params, constraints) else None

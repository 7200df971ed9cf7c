"""Prompt lookup (Saxena 2023): drafts of the next tokens of an answer, from the prompt and the answer so far.

Answers repeat earlier text: names, quotations, code, the form of a list. What followed the last tokens where they occurred
before is drafted, a few tokens of it; one run of the model verifies them all (Leviathan et al. 2023), so that a right draft
saves runs and a wrong one only the time.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np

PRIOR = 2, 3  # right and drafted tokens that count before there are any
FORGET = 0.98  # what the record keeps of itself each time a draft is not verified


class PromptLookup:
    """Drafts for one answer. Remembers, for every n-gram of prompt and answer, where it was last followed by something."""

    def __init__(self, prompt: np.ndarray, vocab: int, longest: int, ngrams: tuple[int, int]) -> None:
        """`prompt`: ids [L]; those that are no token of the model, [0, vocab), are never drafted. `longest`: tokens of a draft.
        `ngrams`: the fewest and the most tokens of an n-gram."""
        self.tokens: list[int] = prompt.tolist()
        self.vocab, self.longest, self.sizes = vocab, longest, range(ngrams[1], ngrams[0] - 1, -1)
        self.answer_length = 0  # tokens of the answer that are in `tokens`
        self.right, self.drafted = map(float, PRIOR)
        self.places: dict[tuple[int, ...], int] = {}  # n-gram -> where what followed it begins
        for end in range(1, len(self.tokens)):
            self._note(end)

    def draft(self, answer: SequenceOf[int], most: int) -> tuple[int, ...]:
        """A draft of at most `most` tokens after the answer so far; often empty."""
        for token in answer[self.answer_length :]:
            self.tokens.append(token)
            self._note(len(self.tokens) - 1)
        self.answer_length = len(answer)
        for size in self.sizes:
            place = self.places.get(tuple(self.tokens[-size:]))
            if place is not None:
                return self._from(place, min(most, self.longest))
        return ()

    def _note(self, end: int) -> None:
        """The token at `end` follows the n-grams before it."""
        for size in self.sizes:
            if size <= end:
                self.places[tuple(self.tokens[end - size : end])] = end

    def _from(self, place: int, count: int) -> tuple[int, ...]:
        """The tokens from `place` on; a repetition that reaches the end is assumed to go on."""
        period, draft = len(self.tokens) - place, []
        for i in range(count):
            token = self.tokens[place + i % period]
            if not 0 <= token < self.vocab:
                break
            draft.append(token)
        return tuple(draft)

    # ---- whether it is worth while

    def expected(self, count: int) -> float:
        """The expected number of right tokens among `count` drafted ones, at the rate of right tokens so far."""
        share = self.right / self.drafted
        return float(count) if share >= 1 else share * (1 - share**count) / (1 - share)

    def verified(self, right: int, count: int) -> None:
        """Record that `right` of `count` drafted tokens were right; tokens after the first wrong one do not count."""
        self.right += right
        self.drafted += min(right + 1, count)

    def skipped(self) -> None:
        """Record a draft that was not worth a run: the record fades a little, so that a later draft is tried."""
        self.right = PRIOR[0] + FORGET * (self.right - PRIOR[0])
        self.drafted = PRIOR[1] + FORGET * (self.drafted - PRIOR[1])

"""The next token of an answer, and whether the answer ends with it."""

from __future__ import annotations

import numpy as np

from ..artifact import ModelInfo
from ..backends.base import Result
from ..processor.detokenizer import IncrementalDetokenizer
from ..sampling.candidates import Candidates
from ..sampling.sampler import logprob_of, sample
from .request import Sequence


class NextToken:
    """Adds tokens to the answers of sequences; a sequence's token source chooses them, or else the sampler."""

    def __init__(self, model: ModelInfo) -> None:
        self.model = model
        self.eos = frozenset(model.eos_token_ids)

    def add(self, sequence: Sequence, result: Result, row: int) -> str | None:
        """Add the token that follows from one row of a result; the finish_reason where the answer ends there."""
        token = self._from_candidates(result.candidates, sequence, row) if result.candidates else None
        if token is None:
            token = self.of_whole_row(sequence, result.row(row))
        if token is None:
            return "dead_end"
        sequence.generated.append(token)
        if sequence.logits_processors:
            sequence.logits_processors.accept(token)
        text = sequence.text  # a signal handler may forget it
        if text is not None:
            text.add_unread(token)
        return self._end(sequence, token, text)

    def _end(self, sequence: Sequence, token: int, text: IncrementalDetokenizer | None) -> str | None:
        """The reason why an answer ends with its last token; None where it goes on."""
        params, logits_processors = sequence.params, sequence.logits_processors
        if (
            (token in self.eos and not params.ignore_eos)
            or token in params.stop_token_ids
            or (logits_processors and logits_processors.done)
            or (text is not None and text.stopped)
        ):
            return "stop"
        if len(sequence.generated) < params.max_new_tokens:
            return None
        # Text that is held back may be a stop string, now that nothing follows.
        return "stop" if text is not None and text.stopped_at_end() else "length"

    def _from_candidates(self, candidates: Candidates, sequence: Sequence, row: int) -> int | None:
        """The token, where the graph's candidates decide it and the request needs nothing else of the row."""
        if sequence.logits_processors or sequence.token_source or sequence.keep_logits or sequence.params.logprobs is not None:
            return None
        model, position = self.model, len(sequence.generated)
        return candidates.choose(row, sequence.sampling, position, used=model.tokenizer.used, vocab=model.vocab_size)

    def of_whole_row(self, sequence: Sequence, logits: np.ndarray) -> int | None:
        """The token, with the logits and log-probabilities that the request keeps; None where no token may follow."""
        logits_processors, logprobs = sequence.logits_processors, sequence.params.logprobs
        row = logits_processors.applied(logits) if logits_processors else logits
        if logits_processors and row.max() == -np.inf:
            return None
        if sequence.keep_logits:
            sequence.logits.append(logits.copy())
        if sequence.token_source:
            token = sequence.token_source(sequence)
        else:
            token = sample(row, sequence.sampling, len(sequence.generated), self.model.tokenizer.used)
        if logprobs is not None:
            sequence.logprobs.append(logprob_of(logits, token, logprobs))
        return token

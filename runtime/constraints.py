"""Answers of a given form: a JSON schema, a regular expression, or one of several texts, by llguidance's automata.

A blank before the answer is allowed: many tokenizers begin a word with one, and the text is given out without it.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from .sampling import SamplingParams
from .shown import shown
from .token_bytes import TokenBytes

if TYPE_CHECKING:
    from llguidance import LLTokenizer


log = logging.getLogger(__name__)


class ConstraintError(ValueError):
    """A form that cannot be asked for; the message says why."""


class Constraint:
    """The automaton of one answer; see logit_rules.Guide."""

    def __init__(self, tokenizer: LLTokenizer, grammar: str, ends: np.ndarray) -> None:
        import llguidance.numpy
        from llguidance import LLMatcher

        self.matcher, self.ends = LLMatcher(tokenizer, grammar), ends
        self.mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self.ended = self.lost = False

    def forbid(self, row: np.ndarray) -> None:
        if self.lost:
            row[:] = -np.inf
            return
        self._fill(self.matcher, self.mask)
        allowed = np.unpackbits(self.mask.view(np.uint8)[0], bitorder="little")[: len(row)].astype(bool)
        allowed[self.ends] = self.matcher.is_accepting()
        np.copyto(row[: len(allowed)], -np.inf, where=~allowed)
        row[len(allowed) :] = -np.inf

    def accept(self, token: int) -> None:
        if token in self.ends:
            self.ended = True
        elif not self.matcher.consume_token(token):
            # A form may be too large to follow, which shows only here; `forbid` lets nothing in any more.
            log.warning("an answer ends early, its form cannot be followed: %s", _first_line(self.matcher.get_error()))
            self.lost = True

    @property
    def done(self) -> bool:
        return self.ended or (self.matcher.is_stopped() and not self.lost)


class Constraints:
    """Makes constraints for one tokenizer."""

    def __init__(self, table: TokenBytes, eos: tuple[int, ...]) -> None:
        """Raises ConstraintError without llguidance. `eos`: the tokens that end an answer."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise ConstraintError(
                "json_schema, regex and choice need the package llguidance; install it with: pip install 'staticvl[constrain]'"
            ) from None
        self.ends = np.array(eos, np.int64)
        self.tokenizer = LLTokenizer(_Tokens(table, eos[0]), n_vocab=len(table.tokens), eos_token=eos[0])  # type: ignore[arg-type]

    def make(self, params: SamplingParams) -> Constraint:
        """Raises ConstraintError for a schema or an expression that llguidance refuses."""
        from llguidance import LLMatcher

        name, grammar = _grammar(params)
        if problem := LLMatcher.validate_grammar(grammar, self.tokenizer):
            raise ConstraintError(f"{name} cannot be used: {shown(' '.join(problem.split()))}")
        return Constraint(self.tokenizer, grammar, self.ends)


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _grammar(params: SamplingParams) -> tuple[str, str]:
    """Which field says the form, and its grammar."""
    from llguidance import LLMatcher

    if params.choice:
        return "choice", 'start: " "? body\nbody: ' + " | ".join(json.dumps(text) for text in params.choice)
    if params.regex is not None:
        return "regex", LLMatcher.grammar_from_regex(f" ?({params.regex})")
    schema: Any = params.json_schema
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return "json_schema", f'start: " "? body\nbody: %json {json.dumps(schema)}'
    except (TypeError, ValueError) as error:
        raise ConstraintError(f"json_schema is not JSON ({error}); expected a JSON schema as text or as a dict") from None


class _Tokens:
    """What LLTokenizer asks of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenBytes, eos: int) -> None:
        # Hidden tokens are marked with 0xFF, which no text holds, so that no grammar ever lets them in.
        hidden = {i: b"\xff<%d>" % i for i in table.hidden}
        self.tokens = [hidden.get(i, token) for i, token in enumerate(table.tokens)]
        self.eos_token_id, self.special_token_ids = eos, table.hidden
        self._longest: dict[bytes, int] = {token: i for i, token in reversed(list(enumerate(table.tokens))) if token}

    def __call__(self, text: str | bytes) -> list[int]:
        """Any tokens that write the text: it is asked only to find forced ones ahead, which we do not use."""
        data, ids = text.encode() if isinstance(text, str) else bytes(text), []
        while data:
            size = next((n for n in range(len(data), 0, -1) if data[:n] in self._longest), 0)
            if not size:
                break
            ids.append(self._longest[data[:size]])
            data = data[size:]
        return ids

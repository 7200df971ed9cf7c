"""Structured outputs: answers by a JSON schema, a regular expression, or a list of texts, with llguidance's automata.

A blank before the answer is allowed: many tokenizers begin a word with one, and the text is given out without it.

The cost of a grammar is bounded: its size here, its compilation in a process of its own (form_process.py), and each
token by llguidance's limits (form_check.py).
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from ..processor.token_bytes import TokenBytes
from ..shown import quoted, shown
from .form_check import parser_limits
from .form_process import FormProcess
from .params import SamplingParams

if TYPE_CHECKING:
    from llguidance import LLMatcher

MOST_REGEX = 10_000  # characters
MOST_JSON = 32_768  # characters of a schema
MOST_CHOICES, MOST_CHOICE_TEXT = 1000, 32_768  # texts, and characters of all of them
# Forced text is sampled token by token like all other text. With forcing llguidance would tokenise all forced text again for
# each token of the answer, which takes minutes for a text of 10,000 characters.
OPTIONS = '%llguidance {"no_forcing": true}\n'
log = logging.getLogger(__name__)


class ConstraintError(ValueError):
    """A schema, expression or choice that cannot be compiled; the message says why."""


class GrammarConstraint:
    """A constraint on one answer: the automaton of its grammar; see logits_processors.Constraint."""

    def __init__(self, maker: ConstraintFactory, matcher: LLMatcher) -> None:
        import llguidance.numpy

        self.matcher, self.ends = matcher, maker.ends
        self.mask = llguidance.numpy.allocate_token_bitmask(1, maker.tokenizer.vocab_size)
        self._fill = llguidance.numpy.fill_next_token_bitmask
        self.ended = self.lost = False

    def forbid(self, row: np.ndarray) -> None:
        if self.lost:
            row[:] = -np.inf
            return
        self._fill(self.matcher, self.mask)
        if self.matcher.is_error():
            self._lose()
            row[:] = -np.inf
            return
        allowed = np.unpackbits(self.mask.view(np.uint8)[0], bitorder="little")[: len(row)].astype(bool)
        allowed[self.ends] = self.matcher.is_accepting()
        np.copyto(row[: len(allowed)], -np.inf, where=~allowed)
        row[len(allowed) :] = -np.inf

    def accept(self, token: int) -> None:
        if token in self.ends:
            self.ended = True
        elif not self.matcher.consume_token(token):
            self._lose()

    def _lose(self) -> None:
        """The grammar has exceeded a limit only now; from here on `forbid` allows no token."""
        self.lost = True
        log.warning("an answer ends early, its form cannot be followed: %s", _first_line(self.matcher.get_error()))

    @property
    def done(self) -> bool:
        return self.ended or (self.matcher.is_stopped() and not self.lost)


class ConstraintFactory:
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
        tokens = _Tokens(table, eos[0])
        self.tokenizer = LLTokenizer(tokens, n_vocab=len(table.tokens), eos_token=eos[0])  # type: ignore[arg-type]
        self.process = FormProcess()
        self._latest: tuple[str, LLMatcher] | None = None  # a grammar that was compiled: n answers have one

    def make(self, params: SamplingParams) -> GrammarConstraint:
        """Raises ConstraintError for a schema or an expression that is too large, or that llguidance refuses."""
        name, grammar = _grammar(params)
        latest = self._latest
        if latest is None or latest[0] != grammar:
            latest = self._latest = grammar, self._compiled(name, grammar)
        return GrammarConstraint(self, latest[1].deep_copy())

    def _compiled(self, name: str, grammar: str) -> LLMatcher:
        """A matcher with its first tokens computed. Another process compiles the grammar first, as this may crash a process."""
        from llguidance import LLMatcher

        if not (problem := self.process.problem_of(grammar)):
            matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=parser_limits())
            if not matcher.is_error():
                matcher.compute_bitmask()
            if not (problem := matcher.get_error()):
                return matcher
        raise ConstraintError(f"{name} cannot be used: {shown(' '.join(problem.split()))}; give a simpler one")


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _grammar(params: SamplingParams) -> tuple[str, str]:
    """The name of the given field, and its grammar; raises ConstraintError for one that is too large."""
    from llguidance import LLMatcher

    if params.choice:
        _check_size("choice", len(params.choice), MOST_CHOICES, "texts")
        _check_size("choice", sum(map(len, params.choice)), MOST_CHOICE_TEXT, "characters")
        return "choice", f'{OPTIONS}start: " "? body\nbody: ' + " | ".join(json.dumps(text) for text in params.choice)
    if params.regex is not None:
        _check_size("regex", len(params.regex), MOST_REGEX, "characters")
        of_regex = json.loads(LLMatcher.grammar_from_regex(f" ?({params.regex})"))["grammars"][0]["lark_grammar"]
        return "regex", OPTIONS + of_regex
    text = _schema_text(params.json_schema)
    _check_size("json_schema", len(text), MOST_JSON, "characters of JSON")
    return "json_schema", f'{OPTIONS}start: " "? body\nbody: %json {text}'


def _schema_text(schema: Any) -> str:
    try:
        if isinstance(schema, str):
            _check_size("json_schema", len(schema), 2 * MOST_JSON, "characters")  # blanks included
            schema = json.loads(schema)
        return json.dumps(schema)
    except ConstraintError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ConstraintError(f"json_schema is not JSON ({error}); expected a JSON schema as text or as a dict") from None


def _check_size(name: str, size: int, most: int, unit: str) -> None:
    if size > most:
        raise ConstraintError(f"{name} has {size} {unit}; expected at most {most}, so give a simpler one")


class _Tokens:
    """The interface that LLTokenizer expects of a tokenizer."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, table: TokenBytes, eos: int) -> None:
        # Hidden tokens are marked with 0xFF, which no text holds, so that no grammar ever lets them in.
        hidden = {i: b"\xff<%d>" % i for i in table.hidden}
        self.tokens = [hidden.get(i, token) for i, token in enumerate(table.tokens)]
        self.eos_token_id, self.special_token_ids = eos, table.hidden

    def __call__(self, text: str) -> list[int]:
        raise AssertionError(f"no grammar forces tokens, and {quoted(text)} was to be written in them")

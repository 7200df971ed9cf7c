"""A process that compiles a grammar before the engine's process does: `python -P form_check.py SECONDS`, started by
form_process.py.

llguidance bounds most of the cost of a grammar (`parser_limits`), but not all of it: the remainders of a large multipleOf and
intersections of patterns take minutes or gigabytes, and a long chain of references overflows the stack, which ends a process.
A thread cannot be limited in this way; a process can, by the limits of the system.

Standard input holds grammars: a line with the number of bytes, then the text. Standard output holds one line of JSON for each:
what is wrong with it, or an empty text. This file imports nothing of ours, so that the process starts in 0.1 s.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

PROCESSOR_S = 2.0  # of processor time, for one grammar
MEMORY_BYTES = 1 << 30  # of addresses, the process itself included
# Of the thread that compiles: about 100 references in a chain. Threads of the engine's process have 2 MiB at least.
STACK_BYTES = 1 << 20


def parser_limits() -> LLParserLimits:
    """Limits of llguidance for a grammar and for each of its tokens; past a limit the matcher fails, not the process."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=1_000_000,  # about 20 ms
        step_lexer_fuel=100_000,  # of one token, about 30 ms
        step_max_items=20_000,  # likewise
        max_items_in_row=2000,
        max_lexer_states=50_000,  # 1 to 2 kB each
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def problem_of(grammar: str, tokenizer: LLTokenizer) -> str:
    """The reason why a grammar cannot be compiled, or its first tokens not computed; empty where both can."""
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher.get_error()


def _serve(seconds: float) -> None:
    """Answer until standard input ends. `seconds`: of processor time that one grammar may take."""
    from llguidance import LLTokenizer

    tokenizer = LLTokenizer("byte")
    while line := sys.stdin.buffer.readline():
        grammar = sys.stdin.buffer.read(int(line)).decode()
        signal.setitimer(signal.ITIMER_PROF, seconds)  # of processor time; its signal ends the process
        problem = problem_of(grammar, tokenizer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(problem) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(float(sys.argv[1]),))
    thread.start()
    thread.join()

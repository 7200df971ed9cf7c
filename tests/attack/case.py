"""What an attack is made of: kinds, cases that can be run again by name, and how they end."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parents[1]
LONGEST_MESSAGE = 1000  # characters that an error may have, paths included


@dataclass(frozen=True, slots=True)
class Attempt:
    """One bad input. `run` gives the name of its ending, or raises what the code under attack raises."""

    what: str  # for people
    run: Callable[[], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of attack. `ground` makes what is attacked, given a folder that all kinds share; `make` makes attempt number
    `index` from it, with random numbers that belong to the case alone."""

    name: str
    what: str
    endings: tuple[str, ...]  # that are allowed: names of results, exceptions and statuses
    limit_s: float  # for one attempt
    count: int  # inputs of a full run
    ground: Callable[[Path], AbstractContextManager[Any]]
    make: Callable[[Any, random.Random, int], Attempt]
    inside: bool = True  # attempts run in a worker process, which may crash or hang
    memory_mb: int = 2000  # resident, that the worker may come to


@dataclass(frozen=True, slots=True)
class Case:
    """Index `index` of a kind under a seed: always the same input."""

    kind: str
    index: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.index}"

    def rng(self) -> random.Random:
        return random.Random(f"{self.seed}/{self.kind}/{self.index}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a case ended."""

    case: Case
    what: str
    ending: str
    detail: str
    seconds: float
    allowed: bool

    def as_data(self) -> dict[str, Any]:
        """A line of the file of failures."""
        return {
            "case": self.case.name,
            "seed": self.case.seed,
            "ending": self.ending,
            "what": self.what,
            "detail": self.detail,
            "seconds": round(self.seconds, 3),
            "again": f"python -m tests.attack --case {self.case.name} --seed {self.case.seed}",
        }


def run_attempt(attempt: Attempt) -> tuple[str, str]:
    """Ending and detail. An exception of ours ends a case by its name; any other, or a message that is no sentence, ends it
    by a name that no kind allows."""
    try:
        return attempt.run(), ""
    except Exception as error:
        return ending_of(error), f"{type(error).__name__}: {error}"[:2000]


def ending_of(error: Exception) -> str:
    """The most general class of ours that the error is of, if its message is one that people can read."""
    ours = [each.__name__ for each in type(error).__mro__ if each.__module__.startswith("staticvl.")]
    if not ours:
        return f"{type(error).__name__} at {_place(error)}"
    name, text = ours[-1], str(error)
    if not text.strip():
        return f"{name} without a message"
    if len(text) > LONGEST_MESSAGE:
        return f"{name} with a message of more than {LONGEST_MESSAGE} characters"
    return name


def _place(error: BaseException) -> str:
    """The innermost line of the project that the exception passed; of the harness where it passed no other."""
    lines = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(Path(name), line) for name, line in lines if Path(name).is_relative_to(REPO) and "site-packages" not in name]
    path, line = next((each for each in reversed(ours) if each[0].parent != HERE), ours[-1])
    return f"{path.parent.name}/{path.name}:{line}"

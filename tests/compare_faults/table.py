"""Runs every seeded fault and writes the table of docs/comparing.md.

python -m tests.compare_faults.table [REGULAR_EXPRESSION of faults to run, without writing]
"""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from staticvl.runtime.files import write_atomically

from ..conftest import REPO
from .catalogue import FAULTS
from .fault import Base, Bases, Fault, named, run

PAGE = REPO / "docs" / "comparing.md"
START, END = "<!-- seeded faults -->", "<!-- end of seeded faults -->"


def main(pattern: str = "") -> int:
    """The number of faults that were not named."""
    rows = []
    with ExitStack() as stack:
        bases = Bases(Path(stack.enter_context(tempfile.TemporaryDirectory())), stack)
        for fault in FAULTS:
            if not re.search(pattern, fault.name):
                continue
            with tempfile.TemporaryDirectory() as folder:
                result, seconds = run(fault, bases, Path(folder))
            wrong = named(fault, result)
            rows.append(row(fault, not result.passed, not wrong, seconds))
            print(rows[-1], wrong, flush=True)
    if not pattern:
        write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8"), rows).encode())
    return sum("| no |" in each for each in rows)


def row(fault: Fault, detected: bool, right: bool, seconds: float) -> str:
    yes = {True: "yes", False: "no"}
    cells = (fault.name, artifact(fault.base), fault.stage, yes[detected], yes[right], f"{seconds:.1f}")
    return f"| {' | '.join(cells)} |"


def artifact(base: Base) -> str:
    """A base in few words."""
    parts = [base.family, *([] if base.quant == "none" else [base.quant])]
    parts += ["calibrated"] if base.calibrated else []
    parts += [f"{base.tp} ranks"] if base.tp > 1 else []
    return ", ".join(parts) + (", by transformers" if base.by == "transformers" else "")


def with_table(page: str, rows: list[str]) -> str:
    """The page with other rows between the marks."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    count = sum("| yes | yes |" in each for each in rows)
    head = (
        f"{count} of {len(rows)} faults are detected and named.\n\n"
        "| fault | artifact | stage | detected | named | core-s |\n|---|---|---|---|---|---|\n"
    )
    return f"{before}{START}\n{head}" + "\n".join(rows) + f"\n{END}{after}"


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""A process that answers requests of an artifact and prints, as JSON, how much memory it has at several points; see
test_cache_memory.py.

    python -m tests.resident_memory ARTIFACT PROMPT_TOKENS CACHE_GB [reuse]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from staticvl import runtime


def resident() -> int:
    """Bytes of memory that is in no file (PSS); files are shared, so their share changes with other processes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) << 10


def main() -> None:
    folder, tokens, cache_gb, *more = sys.argv[1:]
    with runtime.load(folder, threads=1, cache_gb=float(cache_gb), reuse=bool(more)) as model:
        long, short = "a " * int(tokens), "a"
        for text in (short, long):  # what graphs need for themselves stays
            model.generate(text, raw=True, max_new_tokens=2, temperature=0.0)
        before = resident()
        stream = model.stream(long, raw=True, max_new_tokens=4, temperature=0.0, ignore_eos=True)
        next(stream)
        during = resident()
        stream.close()
        for i in range(4 if more else 0):
            model.generate(f"{i} {long}", raw=True, max_new_tokens=2, temperature=0.0)
        print(json.dumps({"before": before, "during": during, "after": resident(), "length": len(long)}))


if __name__ == "__main__":
    main()

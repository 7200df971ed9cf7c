"""Memory read bandwidth of this machine: the bound of every decode step, which reads all weights once.

    python -m benchmarks.bandwidth [--threads 2]

One thread per core sums squares over its part of an array far larger than the caches. The best of several rounds counts, since
other work can only slow a round down. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from staticvl.runtime.backends.cores import usable_cores

MEBIBYTES = 512  # of each thread
PIECE = 1 << 20  # elements: below the size from which BLAS would start threads of its own work is too small to split


def read_gb_per_s(threads: int, rounds: int = 7, mebibytes: int = MEBIBYTES) -> float:
    """Bytes read by all threads together in a second, in GB (1e9), at best."""
    parts = [np.ones(mebibytes << 18, np.float32) for _ in range(threads)]

    def read(part: np.ndarray) -> float:
        return sum(float(np.dot(piece, piece)) for piece in np.split(part, range(PIECE, len(part), PIECE)))

    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(read, parts))
            best = max(best, threads * (mebibytes << 20) / (time.perf_counter() - start) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=usable_cores(), help="threads of the CPU; default: every usable core")
    args = parser.parse_args()
    speeds = {str(n): round(read_gb_per_s(n), 1) for n in sorted({1, args.threads})}
    for threads, speed in speeds.items():
        print(f"{threads} threads read {speed} GB/s")
    print(json.dumps({"read_gb_per_s_by_threads": speeds}))


if __name__ == "__main__":
    main()

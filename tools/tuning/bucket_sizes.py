"""Bucket sizes among which the search chooses."""

from __future__ import annotations

from collections.abc import Mapping

MAX_SIZES = 36  # with these the exact search takes seconds
_PEAK_SHARE = 0.02  # of all prompts: a size at which so many end is added
_MAX_PEAKS = 4


def candidate_sizes(lengths: Mapping[int, float], granularity: int, largest: int) -> list[int]:
    """Multiples of `granularity` up to `largest`, at most about MAX_SIZES, as many in each octave as in the others, and the
    sizes at which many prompts end, as they do where prompts are an image and little text.
    """
    last = min(largest, _round_up(max(lengths), granularity))
    grid = next(
        sizes for steps in (8, 6, 5, 4, 3, 2, 1) if len(sizes := _octaves(granularity, last, steps)) <= MAX_SIZES or steps == 1
    )
    return sorted(set(grid) | set(_peaks(lengths, granularity, last)))


def powers_of_two(smallest: int, longest: int) -> list[int]:
    """Powers of two from `smallest` (rounded down to one) to the first that holds `longest`."""
    first, last = smallest.bit_length() - 1, max(longest - 1, 0).bit_length()
    return [1 << i for i in range(first, max(first, last) + 1)]


def _octaves(granularity: int, last: int, steps: int) -> list[int]:
    sizes, base = {last}, granularity
    while base < last:
        step = _round_up(-(-base // steps), granularity)
        sizes |= {size for size in range(base, 2 * base, step) if size <= last}
        base *= 2
    return sorted(sizes)


def _peaks(lengths: Mapping[int, float], granularity: int, last: int) -> list[int]:
    counts: dict[int, float] = {}
    for length, count in lengths.items():
        counts[_round_up(length, granularity)] = counts.get(_round_up(length, granularity), 0.0) + count
    total = sum(counts.values())
    peaks = sorted(
        (size for size, count in counts.items() if count >= _PEAK_SHARE * total and size <= last), key=lambda s: (-counts[s], s)
    )
    return peaks[:_MAX_PEAKS]


def _round_up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity

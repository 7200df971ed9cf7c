"""The sizes among which buckets are chosen."""

from __future__ import annotations

from collections.abc import Mapping

MOST = 36  # with these the exact search takes seconds
_PEAK = 0.02  # a size that this share of all prompts ends at deserves to be a candidate
_PEAKS = 4


def candidate_sizes(lengths: Mapping[int, float], granularity: int, largest: int) -> list[int]:
    """Multiples of `granularity` up to `largest`, denser where they are small: as many per octave as keep them few; and the
    sizes at which many prompts end, as they do where prompts are an image and little text.
    """
    last = min(largest, _up(max(lengths), granularity))
    grid = next(
        sizes for steps in (8, 6, 5, 4, 3, 2, 1) if len(sizes := _octaves(granularity, last, steps)) <= MOST or steps == 1
    )
    return sorted(set(grid) | set(_peaks(lengths, granularity, last)))


def powers_of_two(smallest: int, longest: int) -> list[int]:
    """2^i from `smallest` (rounded down to one) to the first that holds `longest`."""
    first, last = smallest.bit_length() - 1, max(longest - 1, 0).bit_length()
    return [1 << i for i in range(first, max(first, last) + 1)]


def _octaves(granularity: int, last: int, steps: int) -> list[int]:
    sizes, base = {last}, granularity
    while base < last:
        step = _up(-(-base // steps), granularity)
        sizes |= {size for size in range(base, 2 * base, step) if size <= last}
        base *= 2
    return sorted(sizes)


def _peaks(lengths: Mapping[int, float], granularity: int, last: int) -> list[int]:
    mass: dict[int, float] = {}
    for length, count in lengths.items():
        mass[_up(length, granularity)] = mass.get(_up(length, granularity), 0.0) + count
    total = sum(mass.values())
    peaks = sorted(
        (size for size, count in mass.items() if count >= _PEAK * total and size <= last), key=lambda s: (-mass[s], s)
    )
    return peaks[:_PEAKS]


def _up(size: int, granularity: int) -> int:
    return -(-size // granularity) * granularity

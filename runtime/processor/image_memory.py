"""The memory of large images goes back to the system once it is free."""

from __future__ import annotations

from ..heap import release_freed

LARGE = 4_000_000  # pixels; 16 MB in Pillow, of which decoding holds several copies


def release_memory(pixels: int) -> None:
    """Return free memory to the system after images of so many pixels; nothing for small ones."""
    if pixels >= LARGE:
        release_freed()

"""Pages of mapped weights that nothing reads again go back to the system, and no others."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from staticvl.runtime.backends import mapped_pages
from staticvl.runtime.backends.mapped_pages import SMAPS, release_pages

pytestmark = pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux's list of mappings")
SIZE = 1 << 20  # bytes


def mapped(file: Path) -> np.memmap:
    """The bytes of a file, mapped so that writing changes no file, all read."""
    np.arange(SIZE // 4, dtype=np.int32).tofile(file)
    array = np.memmap(file, np.int32, mode="c")
    array.sum()
    return array


def resident(file: Path) -> int:
    """Kilobytes of a file's mapping that count as this process's memory."""
    lines = SMAPS.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.endswith(str(file)))
    return next(int(line.split()[1]) for line in lines[start:] if line.startswith("Rss:"))


def test_pages_that_were_read_are_released_and_come_back(tmp_path: Path) -> None:
    array = mapped(tmp_path / "a.safetensors")
    assert resident(tmp_path / "a.safetensors") == SIZE >> 10
    release_pages(tmp_path)
    assert resident(tmp_path / "a.safetensors") == 0
    np.testing.assert_array_equal(array, np.arange(SIZE // 4))


def test_what_was_written_stays(tmp_path: Path) -> None:
    array = mapped(tmp_path / "a.safetensors")
    array[mmap.PAGESIZE] = -1
    release_pages(tmp_path)
    assert array[mmap.PAGESIZE] == -1 and array[0] == 0
    assert resident(tmp_path / "a.safetensors") == SIZE >> 10


def test_other_files_and_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("mine", "mine-too"):
        (tmp_path / name).mkdir()
    files = [tmp_path / "mine" / "prefill.bin", tmp_path / "mine-too" / "a.safetensors"]
    arrays = [mapped(file) for file in files]
    release_pages(tmp_path / "mine")
    assert [resident(file) for file in files] == [SIZE >> 10] * 2
    assert all(array[-1] == SIZE // 4 - 1 for array in arrays)


def test_another_system_has_no_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array = mapped(tmp_path / "a.safetensors")
    monkeypatch.setattr(mapped_pages, "SMAPS", tmp_path / "smaps")
    release_pages(tmp_path)
    assert resident(tmp_path / "a.safetensors") == SIZE >> 10
    assert array[5] == 5

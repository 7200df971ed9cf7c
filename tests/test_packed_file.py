"""Packed weights laid out again: the same bytes, each at a page, and nothing lost where that cannot be done."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from staticvl.runtime.backends.packed_file import lay_out


def test_packed_files_are_laid_out_again(tmp_path: Path) -> None:
    data, path = np.random.default_rng(0).bytes(1000), tmp_path / "a.bin"
    path.write_bytes(data)
    entry = {"location": "a.bin", "offset": "3", "length": "100", "prepacked_0": "Kernel+1|103;77;0|180;301;5"}
    found = lay_out(path, {"w": entry})["w"]
    again, (kernel, *blobs) = path.read_bytes(), found["prepacked_0"].split("|")
    places = [(int(found["offset"]), 100), *((int(blob.split(";")[0]), int(blob.split(";")[1])) for blob in blobs)]
    assert (found["location"], found["length"], kernel, [blob[-2:] for blob in blobs]) == (
        "a.bin",
        "100",
        "Kernel+1",
        [";0", ";5"],
    )
    assert all(at % 4096 == 0 for at, _ in places)  # elsewhere each session would copy it
    assert [again[at : at + length] for at, length in places] == [data[3:103], data[103:180], data[180:481]]


@pytest.mark.parametrize("wrong", [{"prepacked_0": "Kernel+1|103;77"}, {"length": "2000"}])
def test_unknown_or_broken_packed_files_are_left_alone(tmp_path: Path, wrong: dict[str, str]) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(1000))
    with pytest.raises(OSError, match=r"not known|ends 1003 bytes too early"):
        lay_out(path, {"w": {"location": "a.bin", "offset": "3", "length": "100"} | wrong})
    assert path.read_bytes() == bytes(1000)

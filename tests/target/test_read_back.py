"""Pieces of files compared with what the device gives back: any change of any byte that was noted is found."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from gemma4_moe.errors import CheckpointFormatError, StorageError
from gemma4_moe.target.read_back import Written
from support.checkpoints import flip_bit

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = random.Random(5).randbytes(20_011)
BOUNDS = ((0, 4096), (4096, 4099), (4099, 4099), (5000, 20_011))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


@pytest.fixture
def written(file: Path) -> Written:
    noted = Written()
    for start, end in BOUNDS:
        noted.note(file, start, memoryview(CONTENT)[start:end])
    return noted


def test_what_is_unchanged_passes_and_is_counted(written: Written) -> None:
    told: list[int] = []
    written.check(10**6, told.append)
    assert sorted(told) == sorted(end - start for start, end in BOUNDS)
    Written().check(10**6)


@pytest.mark.parametrize("position", [0, 4095, 4098, 5000, 20_010])
def test_a_flipped_bit_is_found_and_its_place_named(position: int, written: Written, file: Path) -> None:
    flip_bit(file, position)
    start, end = next((start, end) for start, end in BOUNDS if start <= position < end)
    with pytest.raises(StorageError, match="other bytes") as caught:
        written.check(10**6)
    assert f"[{start}, {end})" in caught.value.facts["expected"]
    assert caught.value.facts["file"] == str(file)


def test_what_was_not_noted_is_not_looked_at(written: Written, file: Path) -> None:
    flip_bit(file, 4500)
    written.check(10**6)


def test_a_file_that_is_cut_off_or_gone_is_an_error(written: Written, file: Path) -> None:
    file.write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointFormatError, match="truncated"):
        written.check(10**6)
    file.unlink()
    with pytest.raises(CheckpointFormatError, match="missing"):
        written.check(10**6)


def test_a_copy_is_compared_with_its_original(tmp_path: Path, file: Path) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(CONTENT)
    noted = Written()
    noted.note_copy(copy, file, 10**6)
    noted.check(10**6)
    flip_bit(copy, 12_345)
    with pytest.raises(StorageError, match="other bytes"):
        noted.check(10**6)

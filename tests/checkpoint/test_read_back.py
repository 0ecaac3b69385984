"""Hashing what is on the device: BLAKE3 and SHA-256 of the very bytes, within the memory allowed, on a few threads."""

from __future__ import annotations

import hashlib
import os
import random
from typing import TYPE_CHECKING

import pytest
from blake3 import blake3

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import Chunk, Extent, OpenFile, hash_extents, sha256
from gemma4_moe.errors import CheckpointFormatError

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = random.Random(2).randbytes(100_001)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("memory", [1, 20_000, 10**6])
def test_extents_of_any_place_and_size(
    memory: int, buffered: bool, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated, whole = [], hashing.allocate
    monkeypatch.setattr(hashing, "allocate", lambda nbytes: allocated.append(nbytes) or whole(nbytes))
    bounds = [(0, 100_001), (4096, 8192), (5, 6), (99_999, 100_001), (7, 7)]
    told: list[int] = []
    with OpenFile(file) as opened:
        extents = {Chunk("x", number): Extent(opened, *pair) for number, pair in enumerate(bounds)}
        found = hash_extents(extents, memory, buffered=buffered, hashed=told.append)
    assert found == {
        Chunk("x", number): blake3(CONTENT[start:end]).hexdigest() for number, (start, end) in enumerate(bounds)
    }
    assert sum(told) == sum(end - start for start, end in bounds)
    assert sum(allocated) <= max(memory, 3 * 4096)


def test_chunks_of_a_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 40_000)
    with OpenFile(file) as opened:
        found = hash_extents(opened.chunks(), 10**6)
    assert list(found.values()) == [blake3(CONTENT[i : i + 40_000]).hexdigest() for i in (0, 40_000, 80_000)]


def test_a_failure_of_one_thread_is_raised(file: Path) -> None:
    with OpenFile(file) as opened:
        extents = {Chunk("x", number): Extent(opened, 0, 5000) for number in range(50)}
        extents[Chunk("y", 0)] = Extent(opened, 100_000, 100_010)
        with pytest.raises(CheckpointFormatError, match="truncated"):
            hash_extents(extents, 10**6)


def test_sha256_of_whole_files(file: Path) -> None:
    (file.parent / "empty").write_bytes(b"")
    with OpenFile(file) as one, OpenFile(file.parent / "empty") as other:
        found = sha256({"f": one, "empty": other}, 2**20)
    assert found == {"f": hashlib.sha256(CONTENT).hexdigest(), "empty": hashlib.sha256(b"").hexdigest()}


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with pytest.raises(CheckpointFormatError):
            OpenFile(tmp_path / name)

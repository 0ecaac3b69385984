"""Hashing what is on the device: BLAKE3 and SHA-256 of the very bytes, within the memory allowed, on a few threads."""

import hashlib
import os
import random
import threading

import pytest
from blake3 import blake3

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.hashing import Extent, blake3_of, hash_extents
from gemma4_moe.errors import CheckpointFormatError

CONTENT = random.Random(2).randbytes(100_001)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    return tmp_path / "f"


@pytest.mark.parametrize("algorithm", [blake3, hashlib.sha256])
@pytest.mark.parametrize("buffered", [False, True])
@pytest.mark.parametrize("memory", [1, 20_000, 10**6])
def test_extents_of_any_place_and_size(memory, buffered, algorithm, file, monkeypatch):
    allocated, whole = [], hashing.allocate
    monkeypatch.setattr(hashing, "allocate", lambda nbytes: allocated.append(nbytes) or whole(nbytes))
    bounds = [(0, 100_001), (4096, 8192), (5, 6), (99_999, 100_001), (7, 7)]
    told = []
    with OpenFile(file) as opened:
        groups = [(Extent(opened, *pair),) for pair in bounds]
        found = hash_extents(groups, memory, algorithm=algorithm, buffered=buffered, hashed=told.append)
    assert found == [algorithm(CONTENT[start:end]).hexdigest() for start, end in bounds]
    assert sum(told) == sum(end - start for start, end in bounds)
    assert sum(allocated) <= max(memory, 3 * 4096)


def test_a_group_is_hashed_one_extent_after_the_other(file, tmp_path):
    (tmp_path / "g").write_bytes(b"of another file")
    with OpenFile(file) as one, OpenFile(tmp_path / "g") as other:
        groups = [(Extent(one, 7, 50_000), Extent(other, 3, 10), Extent(one, 0, 7)), ()]
        found = hash_extents(groups, 10**6)
    raw = CONTENT[7:50_000] + b"another" + CONTENT[:7]
    assert found == [blake3(raw).hexdigest(), blake3(b"").hexdigest()]
    assert found[0] == blake3_of([raw[:9], memoryview(raw)[9:]])


def test_a_failure_of_one_thread_is_raised(file):
    with OpenFile(file) as opened:
        groups = [(Extent(opened, 0, 5000),)] * 50 + [(Extent(opened, 100_000, 100_010),)]
        with pytest.raises(CheckpointFormatError, match="truncated"):
            hash_extents(groups, 10**6)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing"):
        with pytest.raises(CheckpointFormatError):
            OpenFile(tmp_path / name)


def test_a_failure_ends_the_other_threads_at_their_next_piece(file, monkeypatch):
    """One group is endless, as a file of a model is for a user who has pressed Ctrl-C."""
    begun, pieces = threading.Event(), []

    def endless(extent, buffer, *, buffered):
        if extent.start == 1:
            begun.wait(10)
            raise KeyboardInterrupt
        while True:
            begun.set()
            pieces.append(extent)
            yield b"x" * 1000

    monkeypatch.setattr(hashing, "_pieces", endless)
    with OpenFile(file) as opened, pytest.raises(KeyboardInterrupt):
        hash_extents([[Extent(opened, 0, 5)], [Extent(opened, 1, 5)]], 10**6)
    assert pieces

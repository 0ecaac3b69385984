"""Hashes over fixed chunks: those of BLAKE3 on the bytes cut by hand, however the bytes come by."""

from __future__ import annotations

import random

import pytest
from blake3 import blake3

from gemma4_moe.checkpoint import hashing
from gemma4_moe.checkpoint.hashing import Chunk, ChunkHasher, chunk_bounds, chunk_count

CONTENT = random.Random(3).randbytes(1000)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "CHUNK_BYTES", 128)


def by_hand(content: bytes) -> dict[Chunk, str]:
    pieces = [content[start : start + 128] for start in range(0, len(content), 128)]
    return {Chunk("a", number): blake3(piece).hexdigest() for number, piece in enumerate(pieces)}


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("step", [1, 7, 128, 300, 1000])
def test_pieces_of_any_size_give_the_hashes_of_the_chunks(size: int, step: int) -> None:
    hasher, found = ChunkHasher("a", size), {}
    for start in range(0, size, step):
        found |= hasher.feed(start, memoryview(CONTENT)[start : min(start + step, size)])
    assert found == by_hand(CONTENT[:size])
    assert len(found) == chunk_count(size)


def test_after_a_jump_only_whole_chunks_are_hashed() -> None:
    hasher, view, expected = ChunkHasher("a", 1000), memoryview(CONTENT), by_hand(CONTENT)
    assert hasher.feed(100, view[100:300]) == {Chunk("a", 1): expected["a", 1]}
    assert hasher.feed(512, view[512:700]) == {Chunk("a", 4): expected["a", 4]}
    assert hasher.feed(700, view[700:800]) == {Chunk("a", 5): expected["a", 5]}
    assert hasher.feed(900, view[900:1000]) == {}


def test_bounds_cover_the_whole_size() -> None:
    bounds = [chunk_bounds(number, 300) for number in range(chunk_count(300))]
    assert bounds == [(0, 128), (128, 256), (256, 300)]

"""BLAKE3 over fixed chunks: the hashes of a file don't depend on who wrote which part of it, or in which order."""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3

#: Bytes of a chunk, a multiple of a page. The last chunk of a file may be shorter; an empty file has none.
CHUNK_BYTES = 64 * 2**20


class Chunk(NamedTuple):
    """One chunk of a file or of a tensor's data.

    Attributes:
        name: The bare name of the file, or the tensor's name.
        number: Its place, from 0.
    """

    name: str
    number: int


def chunk_count(size: int) -> int:
    """Return how many chunks `size` bytes have."""
    return -(-size // CHUNK_BYTES)


def chunk_bounds(number: int, size: int) -> tuple[int, int]:
    """Return the first byte of a chunk of `size` bytes in all, and the byte after its last."""
    return number * CHUNK_BYTES, min((number + 1) * CHUNK_BYTES, size)


class ChunkHasher:
    """Hashes the bytes of one file or tensor as they come by.

    A chunk is hashed if its bytes come in order and without a gap. Jumps are allowed: a chunk that is entered in its
    middle is left out.
    """

    def __init__(self, name: str, size: int) -> None:
        self._name = name
        self._size = size
        self._position = 0
        self._hasher = blake3()
        self._whole = True

    def feed(self, position: int, content: memoryview) -> dict[Chunk, str]:
        """Take the bytes at `position`, and return the hexadecimal hash of each chunk that they complete."""
        done = {}
        if position != self._position:
            self._hasher.reset()
            self._whole = position % CHUNK_BYTES == 0
        while content.nbytes:
            part = content[: CHUNK_BYTES - position % CHUNK_BYTES]
            self._hasher.update(part)
            position += part.nbytes
            content = content[part.nbytes :]
            if position % CHUNK_BYTES == 0 or position == self._size:
                if self._whole:
                    done[Chunk(self._name, (position - 1) // CHUNK_BYTES)] = self._hasher.hexdigest()
                self._hasher.reset()
                self._whole = True
        self._position = position
        return done


def bytes_hash(content: bytes) -> str:
    """Return the hash of a chunk that is at hand, in hexadecimal."""
    return blake3(content).hexdigest()

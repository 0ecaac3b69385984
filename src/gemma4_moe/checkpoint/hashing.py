"""Hashes of ranges of files, read from the device by a few threads within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from gemma4_moe.checkpoint.readers import PAGE, SLACK, allocate
from gemma4_moe.checkpoint.threads import SharedIterator, run_in_threads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gemma4_moe.checkpoint.readers import Readable

#: The most bytes that a thread reads at once.
_READ_BYTES = 8 * 2**20

#: One thread waits for the disk while another hashes.
_THREADS = 3


def blake3_of(contents: Iterable[bytes | memoryview]) -> str:
    """Return the BLAKE3 of several contents, one after the other, in hexadecimal."""
    hasher = blake3()
    for content in contents:
        hasher.update(content)
    return hasher.hexdigest()


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes (start, end) of an open file."""

    file: Readable
    start: int
    end: int


def hash_extents(
    groups: Sequence[Sequence[Extent]],
    memory: int,
    *,
    buffered: bool = False,
    hashed: Callable[[int], None] | None = None,
    algorithm: Callable[[], Any] = blake3,
) -> list[str]:
    """Return the hash of each group of extents, one after the other, in hexadecimal.

    Args:
        groups: The extents to hash.
        memory: The most bytes of buffers.
        buffered: Read through the page cache, which forgets the files first.
        hashed: Told of the bytes of each group when it is hashed; from several threads, one at a time.
        algorithm: Makes the hasher of a group, as in `hashlib`.

    Raises:
        CheckpointFormatError: A file is too short.
    """
    threads, buffer_bytes = _buffers(memory, len(groups))
    jobs, telling = SharedIterator(enumerate(groups)), Lock()
    found = [""] * len(groups)

    def work(check: Callable[[], None]) -> None:
        buffer = allocate(buffer_bytes)
        for number, group in jobs:
            hasher = algorithm()
            for extent in group:
                for piece in _pieces(extent, buffer, buffered=buffered):
                    hasher.update(piece)
                    check()
            found[number] = hasher.hexdigest()
            if hashed is not None:
                with telling:
                    hashed(sum(extent.end - extent.start for extent in group))

    run_in_threads(threads, work)
    return found


def _buffers(memory: int, most: int) -> tuple[int, int]:
    """Return how many threads to use, `most` at most, and the size of each one's buffer within `memory` bytes."""
    threads = max(1, min(_THREADS, memory // (PAGE + SLACK), most))
    return threads, max(PAGE + SLACK, min(_READ_BYTES + SLACK, memory // threads // PAGE * PAGE))


def _pieces(extent: Extent, buffer: memoryview, *, buffered: bool) -> Iterator[memoryview]:
    """Yield an extent's bytes; each piece is valid until the next is asked for."""
    reader = extent.file.reader(buffered=buffered)
    try:
        step = buffer.nbytes - SLACK
        for start in range(extent.start, extent.end, step):
            yield reader.read(start, min(step, extent.end - start), buffer)
    finally:
        reader.close()

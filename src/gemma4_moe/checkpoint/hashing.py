"""BLAKE3 over fixed chunks: the hashes of a file don't depend on who wrote which part of it, or in which order."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from blake3 import blake3

from gemma4_moe.checkpoint.readers import PAGE, SLACK, PageReader, allocate
from gemma4_moe.checkpoint.storage import open_regular, read_at

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from types import TracebackType

    from gemma4_moe.checkpoint.directory import StoredTensor
    from gemma4_moe.checkpoint.readers import Reader

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


#: What a thread reads at once, in bytes.
_PIECE = 8 * 2**20

#: One thread waits for the disk while another hashes.
_THREADS = 3


class OpenFile:
    """Any regular file, opened for reading at positions. Use it as a context manager.

    Attributes:
        path: Where it was opened.
        size: Its size in bytes.
    """

    def __init__(self, path: Path) -> None:
        """Open the file. Raises what `open_regular` raises."""
        self.path = path
        self._descriptor = open_regular(path)
        self.size = os.fstat(self._descriptor).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the bytes from `offset` on. Raises what `read_at` raises."""
        read_at(self._descriptor, self.path, offset, destination)

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return what reads the file in large pieces, past the page cache unless `buffered`."""
        return PageReader(self, buffered=buffered)

    def chunks(self) -> dict[Chunk, Extent]:
        """Return where each chunk of the file is."""
        return {
            Chunk(self.path.name, number): Extent(self, *chunk_bounds(number, self.size))
            for number in range(chunk_count(self.size))
        }


class Readable(Protocol):
    """A file with a reader: one of this machine, or one that is read over the network."""

    @property
    def size(self) -> int:
        """Its size in bytes."""

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return what reads the file in large pieces."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes of an open file.

    Attributes:
        file: The file.
        start: The first byte.
        end: The byte after the last.
    """

    file: Readable
    start: int
    end: int


def tensor_chunks(tensors: Iterable[StoredTensor]) -> dict[Chunk, Extent]:
    """Return where each chunk of each tensor's data is."""
    return {
        Chunk(tensor.name, number): Extent(tensor.file, *(tensor.entry.start + position for position in bounds))
        for tensor in tensors
        for number in range(chunk_count(tensor.nbytes))
        for bounds in [chunk_bounds(number, tensor.nbytes)]
    }


def hash_extents(
    extents: Mapping[Chunk, Extent],
    memory: int,
    *,
    buffered: bool = False,
    hashed: Callable[[int], None] | None = None,
) -> dict[Chunk, str]:
    """Return the BLAKE3 of each extent, in hexadecimal.

    Args:
        extents: What to hash.
        memory: The most bytes of buffers.
        buffered: Read through the page cache; what it holds of the files is dropped first.
        hashed: Told of the bytes of each extent when it is hashed; from several threads, one at a time.

    Raises:
        CheckpointFormatError: A file is too short.
        StorageError: The disk refused.
    """
    threads, buffer_bytes = _buffers(memory, len(extents))
    jobs = iter(extents.items())
    taking = Lock()
    found: dict[Chunk, str] = {}

    def work() -> None:
        buffer = allocate(buffer_bytes)
        while True:
            with taking:
                chunk, extent = next(jobs, (None, None))
            if chunk is None or extent is None:
                return
            hasher = blake3()
            for piece in _pieces(extent, buffer, buffered=buffered):
                hasher.update(piece)
            with taking:
                found[chunk] = hasher.hexdigest()
                if hashed is not None:
                    hashed(extent.end - extent.start)

    with ThreadPoolExecutor(threads) as pool:
        try:
            futures = [pool.submit(work) for _ in range(threads)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            jobs = iter(())  # after a failure or an interrupt, the others stop at their next chunk
        for future in futures:
            future.result()
    return {chunk: found[chunk] for chunk in extents}


def sha256(files: Mapping[str, Readable], memory: int, *, buffered: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each whole file by its name, in hexadecimal.

    Args:
        files: What to hash.
        memory: The most bytes of buffers.
        buffered: See `hash_extents`.

    Raises:
        CheckpointFormatError: A file was cut off meanwhile.
        StorageError: The disk refused.
    """
    threads, buffer_bytes = _buffers(memory, len(files))

    def digest(file: Readable) -> str:
        hasher = hashlib.sha256()
        for piece in _pieces(Extent(file, 0, file.size), allocate(buffer_bytes), buffered=buffered):
            hasher.update(piece)
        return hasher.hexdigest()

    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(files, pool.map(digest, files.values()), strict=True))


def _buffers(memory: int, most: int) -> tuple[int, int]:
    """Return how many threads to use, `most` at most, and the size of each one's buffer within `memory` bytes."""
    threads = max(1, min(_THREADS, memory // (PAGE + SLACK), most))
    return threads, max(PAGE + SLACK, min(_PIECE + SLACK, memory // threads // PAGE * PAGE))


def _pieces(extent: Extent, buffer: memoryview, *, buffered: bool) -> Iterator[memoryview]:
    """Yield an extent's bytes; each piece is valid until the next is asked for."""
    reader = extent.file.reader(buffered=buffered)
    try:
        step = buffer.nbytes - SLACK
        for start in range(extent.start, extent.end, step):
            yield reader.read(start, min(step, extent.end - start), buffer)
    finally:
        reader.close()

"""What was written where, by hash, to be compared with what the device gives back before it is published."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blake3 import blake3

from gemma4_moe.checkpoint.hashing import Chunk, Extent, OpenFile, chunk_bounds, hash_extents
from gemma4_moe.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Piece:
    path: Path
    start: int
    end: int
    digest: str


class Written:
    """The pieces that one process has written, whatever their places and sizes."""

    def __init__(self) -> None:
        self._pieces: list[_Piece] = []

    def note(self, path: Path, offset: int, content: memoryview) -> None:
        """Take note of bytes (C-contiguous) that are written to `path` at `offset`."""
        self._pieces.append(_Piece(path, offset, offset + content.nbytes, blake3(content).hexdigest()))

    def note_copy(self, path: Path, original: Path, memory: int) -> None:
        """Take note of a file that was copied from `original`, which is hashed with at most `memory` bytes of buffers.

        Raises:
            CheckpointFormatError: The original is missing.
            StorageError: The disk refused.
        """
        with OpenFile(original) as file:
            for chunk, digest in hash_extents(file.chunks(), memory, buffered=True).items():
                self._pieces.append(_Piece(path, *chunk_bounds(chunk.number, file.size), digest))

    def check(self, memory: int, hashed: Callable[[int], None] | None = None) -> None:
        """Read every piece back past the page cache, with at most `memory` bytes of buffers, and compare hashes.

        Args:
            memory: The most bytes of buffers.
            hashed: Told of the bytes of each piece when it is read; from several threads, one at a time.

        Raises:
            CheckpointFormatError: A file is gone, or shorter than it was.
            StorageError: The disk refused, or gave back other bytes than were written.
        """
        with ExitStack() as stack:
            files = {path: stack.enter_context(OpenFile(path)) for path in {piece.path for piece in self._pieces}}
            extents = {
                Chunk(piece.path.name, number): Extent(files[piece.path], piece.start, piece.end)
                for number, piece in enumerate(self._pieces)
            }
            found = hash_extents(extents, memory, hashed=hashed)
        for piece, digest in zip(self._pieces, found.values(), strict=True):
            if digest != piece.digest:
                raise StorageError(
                    "the disk gives back other bytes than were written",
                    file=piece.path,
                    expected=f"BLAKE3 {piece.digest} in [{piece.start}, {piece.end})",
                    found=f"BLAKE3 {digest}",
                    hint="check the disk and the memory, and write again",
                )

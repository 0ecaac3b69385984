"""Pieces of a target's files: ranges of bytes with their hashes, and the check that the device gives them back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.file import OpenFile
from gemma4_moe.checkpoint.hashing import Extent, blake3_of, hash_extents
from gemma4_moe.checkpoint.storage import refusals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from gemma4_moe.sizes import Progress


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes (start, end) of a file as they were written, their BLAKE3, and facts in JSON that are journalled too."""

    file: str
    start: int
    end: int
    digest: str
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def place(self) -> tuple[str, int, int]:
        """The file, the first byte, and the byte after the last."""
        return self.file, self.start, self.end

    @property
    def size(self) -> int:
        """The number of its bytes."""
        return self.end - self.start


def piece_of(file: str, start: int, content: bytes | memoryview, **facts: Any) -> Piece:
    """Return the piece for `content` (C-contiguous) at byte `start` of a file."""
    return Piece(file, start, start + memoryview(content).nbytes, blake3_of([content]), facts)


def gaps(pieces: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """Return where ranges (start, end) don't cover `size` bytes once: as (end of one, start of the next)."""
    edges = pairwise([(0, 0), *sorted(pieces), (size, size)])
    return [(before, after) for (_, before), (after, _) in edges if before != after]


class Count:
    """Adds up the bytes of a run's stages, and tells a progress callback the sum and the total of all stages.

    A stage that counts more bytes than were expected stays at its end until the next one begins.
    """

    def __init__(self, stages: Sequence[int], progress: Progress | None) -> None:
        """Begin the first stage; `stages` are the bytes that each is expected to count."""
        self._ends = list(accumulate(stages))
        self._stage, self._done, self._progress = 0, 0, progress

    def __call__(self, nbytes: int) -> None:
        """Add `nbytes`."""
        self._done = min(self._done + nbytes, self._ends[self._stage])
        if self._progress is not None:
            self._progress(self._done, self._ends[-1])

    def begin_next_stage(self) -> None:
        """Count from the end of this stage on, whatever it has counted."""
        self._done = self._ends[self._stage]
        self._stage += 1


def wrong_pieces(
    directory: Path,
    sizes: Mapping[str, int],
    pieces: Sequence[Piece],
    memory: int,
    *,
    buffered: bool = False,
    hashed: Callable[[int], None] | None = None,
) -> dict[Piece, str]:
    """Return the pieces that the device does not give back, each with a sentence on the difference.

    `sizes` are those of the files. For `memory`, `buffered` and `hashed` see `hash_extents`.
    """
    files: dict[str, OpenFile] = {}
    unusable: dict[str, str] = {}
    with ExitStack() as stack:
        for name in sorted({piece.file for piece in pieces}):
            with refusals("look at the file", directory / name):
                is_there = (directory / name).is_file()
            if not is_there:
                unusable[name] = f"{name}: missing"
                continue
            files[name] = stack.enter_context(OpenFile(directory / name))
            if files[name].size != sizes[name]:
                unusable[name] = f"{name}: {files[name].size} bytes, not {sizes[name]}"
        readable = [piece for piece in pieces if piece.file not in unusable]
        groups = [(Extent(files[piece.file], piece.start, piece.end),) for piece in readable]
        found = hash_extents(groups, memory, buffered=buffered, hashed=hashed)
    digests = dict(zip(readable, found, strict=True))
    wrong = {}
    for piece in pieces:
        if piece.file in unusable:
            wrong[piece] = unusable[piece.file]
        elif digests[piece] != piece.digest:
            place = f"{piece.file}: other bytes in ({piece.start}, {piece.end})"
            wrong[piece] = f"{place}: BLAKE3 {digests[piece]}, not {piece.digest}"
    return wrong

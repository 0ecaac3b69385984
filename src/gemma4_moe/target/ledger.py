"""The pieces that a run has written: they wait until their bytes are on the device, and only then enter the journal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gemma4_moe.target.journal import as_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from gemma4_moe.sizes import Progress
    from gemma4_moe.target.journal import Journal, Journalled
    from gemma4_moe.target.pieces import Piece
    from gemma4_moe.target.writers import PageWriter

#: Between two entries into the journal: at most so many bytes, and about so many seconds.
FLUSH_BYTES = 2**30
FLUSH_SECONDS = 10.0


class Count:
    """Adds up bytes, and tells a progress callback."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._done = 0
        self._total = total
        self._progress = progress

    def __call__(self, nbytes: int) -> None:
        """Add `nbytes`."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


class Ledger:
    """Brings pieces that were written to the device and journals them, every now and then. Used by one thread."""

    def __init__(self, journal: Journal, known: Journalled, check: Callable[[], None], count: Count) -> None:
        """Begin with nothing written.

        Args:
            journal: The journal to write.
            known: The pieces that were journalled before; a new one joins them, and is compared with its forerunner.
            check: Called before each entry; raises if the run must not go on.
            count: Told of the bytes of each piece.
        """
        self._journal = journal
        self._known = known
        self._check = check
        self._count = count
        self._pieces: list[tuple[PageWriter, Piece]] = []
        self._written = 0
        self._flushed = time.monotonic()

    def wrote(self, file: PageWriter, piece: Piece) -> None:
        """Take note of a piece that was written.

        Raises:
            SourceChangedError, TargetBusyError: What `check` raised, or the source gave other bytes than before.
            StorageError: The disk refused.
        """
        self._pieces.append((file, piece))
        self._written += piece.end - piece.start
        if self._written >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
        self._count(piece.end - piece.start)

    def flush(self) -> None:
        """Bring all pieces that were written to the device, then journal them. Raises what `wrote` raises."""
        for file in dict.fromkeys(file for file, _ in self._pieces):
            file.sync()
        self._check()
        for _, piece in self._pieces:
            self._known.add(piece)
        if self._pieces:
            self._journal.append(pieces=as_rows(piece for _, piece in self._pieces))
        self._pieces.clear()
        self._written = 0
        self._flushed = time.monotonic()

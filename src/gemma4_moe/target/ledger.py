"""What a run has made so far: hashes wait here until their bytes are on the device, and only then enter the journal."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from gemma4_moe.target.journal import as_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gemma4_moe.checkpoint.hashing import Chunk
    from gemma4_moe.target.journal import Journal, Journalled, Overflows
    from gemma4_moe.target.writers import PageWriter

#: Between two entries into the journal: at most so many bytes, and about so many seconds.
FLUSH_BYTES = 2**30
FLUSH_SECONDS = 10.0


class Progress(Protocol):
    """Told of the bytes of tensors written so far, from the writer's thread."""

    def __call__(self, done: int, total: int) -> None:
        """Take note that `done` of `total` bytes are written."""


class Ledger:
    """Brings what was written to the device and journals it, every now and then. Used by the writing thread."""

    def __init__(
        self, journal: Journal, known: Journalled, check: Callable[[], None], total: int, progress: Progress | None
    ) -> None:
        """Begin with nothing written.

        Args:
            journal: Where to write what is on the device.
            known: What earlier runs have journalled; hashes of the source are compared with it.
            check: Called before each entry; raises if the run must not go on.
            total: Bytes of tensors that the run has to write.
            progress: Told how far it is.
        """
        self._done = 0
        self._total = total
        self._progress = progress
        self._journal = journal
        self._known = known
        self._check = check
        self._unsynced: dict[PageWriter, None] = {}
        self._target: dict[Chunk, str] = {}
        self._overflows: dict[Chunk, Mapping[str, int]] = {}
        self._source: deque[tuple[Chunk, str]] = deque()  # filled by another thread
        self._written = 0
        self._flushed = time.monotonic()

    def read(self, hashes: Mapping[Chunk, str]) -> None:
        """Take note of chunks of the source that were read whole. Called by the computing thread."""
        self._source.extend(hashes.items())

    def wrote(
        self, file: PageWriter, nbytes: int, hashes: Mapping[Chunk, str], overflows: Overflows | None = None
    ) -> None:
        """Take note of bytes that were written, of the chunks that they complete, and of what has overflowed in these.

        Raises:
            SourceChangedError, TargetBusyError: What `check` raised, or the source gave other bytes than before.
            StorageError: The disk refused.
        """
        self._done += nbytes
        self._written += nbytes
        self._unsynced[file] = None
        self._target.update(hashes)
        self._overflows.update(overflows or {})
        if self._written >= FLUSH_BYTES or time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()
        if self._progress is not None and nbytes:
            self._progress(self._done, self._total)

    def flush(self) -> None:
        """Bring all that was written to the device, then journal it. Raises what `wrote` raises."""
        for file in self._unsynced:
            file.sync()
        self._check()
        source = dict(self._source.popleft() for _ in range(len(self._source)))
        if self._target or source:
            record: dict[str, Any] = {"target": as_rows(self._target), "source": as_rows(source)}
            if self._overflows:
                record["overflows"] = as_rows(self._overflows)
            self._known.take(record)
            self._journal.append(**record)
        self._unsynced.clear()
        self._target.clear()
        self._overflows.clear()
        self._written = 0
        self._flushed = time.monotonic()

"""Reading a file in large pieces: past the page cache, through it, or the quicker.

Read-ahead keeps a device busy between two reads, and costs processor time. Which way is quicker depends on the device
and on the work of other processes. Direct I/O asks that positions, sizes and memory are multiples of a page, so a
reader reads the pages around the bytes that it is asked for. Neither way leaves the file in the page cache.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from gemma4_moe.checkpoint.storage import refusal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


#: Positions, sizes and memory of direct I/O are multiples of this, in bytes.
PAGE = 4096

#: Bytes that a buffer needs beyond those that are asked for: the rest of the first page and of the last.
SLACK = 2 * PAGE


class Reader(Protocol):
    """A reader of a file in large pieces."""

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Return the file's bytes [offset, offset + size), somewhere in `buffer`. It has `SLACK` bytes more."""

    def close(self) -> None:
        """Close the descriptors that the reader has opened."""


class ReadAt(Protocol):
    """An open file that is read at positions."""

    path: Path

    def fileno(self) -> int:
        """Return its descriptor, or -1 for a file that is not on this machine."""

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the bytes from `offset` on."""


class Readable(ReadAt, Protocol):
    """Bytes that are read at positions or in large pieces: of one file, or of a tensor in parts of several."""

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return a reader of large pieces, past the page cache unless `buffered`."""

    def quickest_reader(self) -> Reader:
        """Return a reader of large pieces in the quicker of two ways, which leaves none in the cache."""


def allocate(nbytes: int) -> memoryview:
    """Return memory that starts on a page; it is taken when it is first written."""
    return memoryview(mmap.mmap(-1, max(1, nbytes)))


def whole_pages(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class PageReader:
    """Reads an open file into buffers. Close it after use, and before the file."""

    def __init__(self, file: ReadAt, *, buffered: bool = False) -> None:
        """Take an open file, and drop its pages from the page cache.

        If `buffered`, each range is read through the page cache, and then dropped from it. Otherwise the file is read
        past the page cache if the system and the filesystem can do that.
        """
        self._file = file
        drop_cache(file.fileno(), 0, 0)
        self._direct = None if buffered else reopen_direct(file.fileno(), os.O_RDONLY)

    def close(self) -> None:
        """Close the descriptor that this reader has opened."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read as a `Reader` does. A file that was cut off after it was opened is a CheckpointFormatError."""
        lead = offset % PAGE
        if self._direct is not None and self._read_pages(self._direct, offset - lead, lead + size, buffer):
            return buffer[lead : lead + size]
        into = buffer[:size]
        self._file.read_into(offset, into)
        drop_cache(self._file.fileno(), offset, size)
        return into

    def _read_pages(self, descriptor: int, start: int, size: int, buffer: memoryview) -> bool:
        """Fill the start of `buffer` from the page at `start`. Return False if that can't be done this way."""
        done = 0
        while done < size:
            try:
                count = os.preadv(descriptor, [buffer[done : whole_pages(size)]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise refusal("read the file", self._file.path, error) from error
                self.close()
                return False
            done += count
            if done < size and (count == 0 or done % PAGE):  # the file's end
                return False
        return True


def drop_cache(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to forget a range's pages that are on the device. Size 0 means to the end."""
    if descriptor >= 0 and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def reopen_direct(descriptor: int, flags: int) -> int | None:
    """Return a second descriptor of an open file for direct I/O, or None if impossible."""
    if descriptor < 0 or sys.platform != "linux":
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # no direct I/O here, or no /proc: the ordinary way reports any other trouble
        return None


#: Bytes that are read in one way before the other is tried, and the number of trials of each before one is chosen.
TRIAL_BYTES = 64 * 2**20

TRIALS = 2


class QuickerReader:
    """Reads a file in two ways by turns, then in the quicker one. For one thread; close it after use."""

    def __init__(self, direct: Reader, buffered: Reader, clock: Callable[[], float] = perf_counter) -> None:
        """Take two readers and a clock in seconds. If both take the same time, `direct` is chosen."""
        self._ways = (direct, buffered)
        self._clock = clock
        self._bytes = [0, 0]
        self._seconds = [0.0, 0.0]
        self._chosen: int | None = None

    def close(self) -> None:
        """Close both readers."""
        for way in self._ways:
            way.close()

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Read, and raise, as the two readers do."""
        if self._chosen is not None:
            return self._ways[self._chosen].read(offset, size, buffer)
        way = int(self._bytes[0] // TRIAL_BYTES > self._bytes[1] // TRIAL_BYTES)
        start = self._clock()
        found = self._ways[way].read(offset, size, buffer)
        self._seconds[way] += self._clock() - start
        self._bytes[way] += size
        if min(self._bytes) >= TRIALS * TRIAL_BYTES:
            direct, buffered = (seconds / nbytes for seconds, nbytes in zip(self._seconds, self._bytes, strict=True))
            self._chosen = int(buffered < direct)
        return found

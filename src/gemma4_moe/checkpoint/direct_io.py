"""Reading and writing past the page cache, in whole pages, and what takes its place where the filesystem can't.

Direct I/O asks that positions, sizes and memory are multiples of a page. A reader therefore reads the pages around what
it is asked for. A writer is given a file's bytes in order, and holds back the bytes of a last, incomplete page until
those that follow it come.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
from typing import TYPE_CHECKING, Protocol

from gemma4_moe.checkpoint.storage import refusal
from gemma4_moe.target.file_layout import DATA_ALIGNMENT

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.target.writers import SafetensorsWriter

#: What positions, sizes and memory of direct I/O are multiples of, in bytes.
PAGE = DATA_ALIGNMENT

#: What a buffer needs beyond the bytes that are asked for: the rest of the first and of the last page.
SLACK = 2 * PAGE


class Reader(Protocol):
    """Reads a file in large pieces."""

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Return the file's bytes [offset, offset + size) somewhere in `buffer`, which has `SLACK` bytes more."""

    def close(self) -> None:
        """Give back what the reader holds."""


class OpenLocally(Protocol):
    """A file of this machine that is open."""

    path: Path

    def fileno(self) -> int:
        """Return its descriptor."""

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` with the bytes from `offset` on."""


def allocate(nbytes: int) -> memoryview:
    """Return memory that starts on a page; it is taken when it is first written."""
    return memoryview(mmap.mmap(-1, max(1, nbytes)))


def whole_pages(nbytes: int) -> int:
    """Return `nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


class PageReader:
    """Reads an open file through buffers, past the page cache where that works. Close it after use."""

    def __init__(self, file: OpenLocally, *, buffered: bool = False) -> None:
        """Take an open file, and let the page cache forget what it holds of it, so that the device is read.

        Args:
            file: The file; it must stay open.
            buffered: Read through the page cache, and drop from it what was read.
        """
        self._file = file
        drop_cache(file.fileno(), 0, 0)
        self._direct = None if buffered else _reopen(file.fileno(), os.O_RDONLY)

    def close(self) -> None:
        """Close what this reader has opened itself."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def read(self, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Return the file's bytes [offset, offset + size) somewhere in `buffer`, which has `SLACK` bytes more.

        Raises:
            CheckpointFormatError: The file is too short: it was cut off after it was opened.
            StorageError: The disk refused.
        """
        lead = offset % PAGE
        if self._direct is not None and self._read_pages(offset - lead, lead + size, buffer):
            return buffer[lead : lead + size]
        into = buffer[:size]
        self._file.read_into(offset, into)
        drop_cache(self._file.fileno(), offset, size)
        return into

    def _read_pages(self, start: int, size: int, buffer: memoryview) -> bool:
        """Fill the start of `buffer` from the page at `start`. Return False where the file has to be read otherwise."""
        assert self._direct is not None, "the caller has looked"
        done = 0
        while done < size:
            if done % PAGE:  # the file's end
                return False
            try:
                count = os.preadv(self._direct, [buffer[done : whole_pages(size)]], start + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise refusal("read the file", self._file.path, error) from error
                self.close()
                return False
            if count == 0:
                return False
            done += count
        return True


class PageWriter:
    """Writes one file's bytes in order, past the page cache where that works. Close it after use.

    Jumps are allowed to the start of a page, and from the end of one.
    """

    def __init__(self, file: SafetensorsWriter, *, buffered: bool = False) -> None:
        self._file = file
        self._direct = None if buffered else _reopen(file.fileno(), os.O_WRONLY)
        self._held = b""

    def close(self) -> None:
        """Close what this writer has opened itself."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def write(self, offset: int, buffer: memoryview, begin: int, end: int) -> None:
        """Write buffer[begin:end] at `offset`.

        `begin` lies as far behind a page as `offset` does; the bytes before it, back to the page, are overwritten.

        Raises:
            StorageError: The disk refused.
        """
        lead = offset % PAGE
        assert lead == len(self._held), "the bytes before these were written before"
        buffer[begin - lead : begin] = self._held
        begin, offset = begin - lead, offset - lead
        whole = begin + (end - begin) // PAGE * PAGE
        self._write_pages(offset, buffer[begin:whole])
        offset, rest = offset + whole - begin, buffer[whole:end]
        self._held = b""
        if offset + rest.nbytes == self._file.size:
            self._file.write(offset, rest)
        else:
            self._held = bytes(rest)

    def sync(self) -> None:
        """Return when all whole pages that were written are on the device. Raises what the file's `sync` raises."""
        self._file.sync()
        if self._direct is None:
            drop_cache(self._file.fileno(), 0, 0)

    def _write_pages(self, offset: int, pages: memoryview) -> None:
        while self._direct is not None and pages:
            try:
                count = os.pwrite(self._direct, pages, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise refusal("write the file", self._file.path, error) from error
                count = -1
            if count % PAGE:  # the filesystem asks for more than pages, or has stopped within one
                self.close()
                break
            offset, pages = offset + count, pages[count:]
        self._file.write(offset, pages)


def drop_cache(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to forget the pages of a range that are on the device; size 0 means to the end."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def _reopen(descriptor: int, flags: int) -> int | None:
    """Open an open file once more, for direct I/O; None where that can't be done."""
    if sys.platform != "linux":
        return None
    try:
        return os.open(f"/proc/self/fd/{descriptor}", flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:  # no direct I/O here, or no /proc: whatever else is wrong, the ordinary way will say
        return None

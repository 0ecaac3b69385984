"""A safetensors file whose header is known before its data: created at its full size, then written at positions."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from gemma4_moe.checkpoint.readers import PAGE, drop_cache, reopen_direct
from gemma4_moe.checkpoint.storage import refusal, refusals

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.errors import StorageError


class SafetensorsWriter:
    """A new file. Any number of threads may write it; its content is on the device only after `close` has returned.

    As a context manager it closes the file at the end, or abandons it where an error ends the block.
    """

    def __init__(self, path: Path, header: bytes, size: int) -> None:
        """Create the file, reserve its blocks and write its header.

        The file must not exist; its permissions are those that the umask leaves. If it can't be reserved or written,
        it is removed again.
        """
        self.path, self.size = path, size
        self._failure: StorageError | None = None
        with refusals("create the file", path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with refusals(f"reserve {size} bytes", path):
                _reserve(self._descriptor, size)
            self.write(0, memoryview(header))
        except BaseException:
            self.abandon()
            path.unlink()
            raise

    @classmethod
    def reopen(cls, path: Path, size: int) -> Self:
        """Open a file that another writer has created with this size, here or on another rank, to write its data."""
        writer = cls.__new__(cls)
        writer.path, writer.size, writer._failure = path, size, None
        with refusals("open the file", path):
            writer._descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            found = os.fstat(writer._descriptor).st_size
        if found != size:
            writer.abandon()
            raise ValueError(f"{path} has {found} bytes, not {size}")
        return writer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def write(self, offset: int, source: memoryview) -> None:
        """Write `source` (C-contiguous) at `offset`, within the file's size."""
        if offset < 0 or offset + source.nbytes > self.size:
            raise ValueError(f"[{offset}, {offset + source.nbytes}) is outside of a file of {self.size} bytes")
        view = source if source.nbytes == 0 else source.cast("B")
        while view.nbytes:
            with refusals("write the file", self.path):
                count = os.pwrite(self._descriptor, view, offset)
            view = view[count:]
            offset += count

    def sync(self) -> None:
        """Return once all that was written is on the device.

        After a failure the kernel drops the pages and calls them clean, and a second attempt would succeed without
        having written them. So the first failure is this file's last word.
        """
        if self._failure is not None:
            raise self._failure
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._failure = refusal("bring the file to the disk", self.path, error)
            raise self._failure from error

    def close(self) -> None:
        """Bring the file to the device and close it. After a success, further calls do nothing."""
        if self._descriptor < 0 and self._failure is None:
            return
        try:
            self.sync()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is. Nothing is known of what has reached the device."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with refusals("close the file", self.path):
                os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    """Give an empty file its size and, where the filesystem can without writing them, its blocks."""
    fallocate = _fallocate()
    while fallocate is not None and fallocate(descriptor, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code in (errno.EOPNOTSUPP, errno.ENOSYS):
            fallocate = None
        elif code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    if fallocate is None:
        os.ftruncate(descriptor, size)


@cache
def _fallocate() -> Any:
    """Return the system call itself: os.posix_fallocate writes every block where the filesystem can't reserve."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    function = getattr(libc, "fallocate64", None) or libc.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    return function


class PageWriter:
    """Writes pieces of one file in any order: whole pages past the page cache where that works. Close it after use.

    The device then works from the first write on, and no dirty pages gather that `fsync` would have to wait for.
    """

    def __init__(self, file: SafetensorsWriter, *, buffered: bool = False) -> None:
        self._file = file
        self._direct = None if buffered else reopen_direct(file.fileno(), os.O_WRONLY)

    def close(self) -> None:
        """Close the descriptor that this writer has opened."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def write(self, offset: int, content: memoryview) -> None:
        """Write `content` at `offset`; it must lie as far behind a page in memory as `offset` does in the file.

        The pages at its two ends, where it fills them in part, are written through the page cache.
        """
        first = min(-offset % PAGE, content.nbytes)
        last = first + (content.nbytes - first) // PAGE * PAGE
        self._file.write(offset, content[:first])
        self._write_pages(offset + first, content[first:last])
        self._file.write(offset + last, content[last:])

    def sync(self) -> None:
        """Return once all that was written is on the device. Raises what the file's `sync` raises."""
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

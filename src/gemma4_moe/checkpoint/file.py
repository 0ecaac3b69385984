"""A safetensors file opened for reading at positions, without mapping it.

A file that is cut off while it is read gives an error, never a signal. Reading leaves no position behind, so that any
number of threads may read one file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from gemma4_moe.checkpoint.header import LENGTH, Header, header_size, parse_header
from gemma4_moe.checkpoint.impostors import check_genuine
from gemma4_moe.checkpoint.readers import PageReader, QuickerReader
from gemma4_moe.checkpoint.storage import open_regular, read_at, refusals
from gemma4_moe.errors import SourceChangedError

if TYPE_CHECKING:
    from pathlib import Path

    from gemma4_moe.checkpoint.readers import Reader


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The facts that tell a file from another one, or from itself after a change.

    Attributes:
        size: Its size in bytes.
        mtime_ns: When it was last written, in nanoseconds since the epoch.
        header_digest: SHA-256 of its header, in hexadecimal.
    """

    size: int
    mtime_ns: int
    inode: int
    header_digest: str


class OpenFile:
    """Any regular file, opened for reading at positions. Use it as a context manager, or call `close`."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises what `open_regular` raises."""
        self.path = path
        self._descriptor = open_regular(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return os.fstat(self._descriptor).st_size

    def fileno(self) -> int:
        """Return the descriptor."""
        return self._descriptor

    def reader(self, *, buffered: bool = False) -> Reader:
        """Return a reader of large pieces, past the page cache unless `buffered`."""
        return PageReader(self, buffered=buffered)

    def quickest_reader(self) -> Reader:
        """Return a reader of large pieces in the quicker of two ways, which leaves none in the cache."""
        return QuickerReader(PageReader(self), PageReader(self, buffered=True))

    def close(self) -> None:
        """Close the file. Further calls do nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read_into(self, offset: int, destination: memoryview) -> None:
        """Fill `destination` (C-contiguous) with the file's bytes from `offset` on.

        Raises:
            CheckpointFormatError: The file ends too early: it was cut off after it was opened.
        """
        read_at(self._descriptor, self.path, offset, destination)


class IdentifiedFile(OpenFile):
    """An open file that can tell that it was changed."""

    identity: FileIdentity  # when it was opened

    def __init__(self, path: Path, header_digest: str) -> None:
        """Open a file of another format; the digest is that of whatever describes its content."""
        super().__init__(path)
        try:
            self.identity = FileIdentity(*self._status(), header_digest)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """The file's size in bytes when it was opened."""
        return self.identity.size

    def check_unchanged(self) -> None:
        """Check that the open file, and the one that its path names now, have not changed.

        Raises:
            SourceChangedError: Size, time of writing, inode or header differ, or the path names nothing any more.
        """
        try:
            with refusals("look at the file", self.path):
                statuses = [os.fstat(self._descriptor), self.path.stat()]
        except OSError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._changed("no file") from error
            raise
        header_digest = self._header_digest()
        for status in statuses:
            now = FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino, header_digest)
            if now != self.identity:
                raise self._changed(now)

    def _changed(self, found: object) -> SourceChangedError:
        return SourceChangedError(
            "the file changed while it was read",
            file=self.path,
            expected=self.identity,
            found=found,
            hint="let nothing write the source, and start again",
        )

    def _status(self) -> tuple[int, int, int]:
        """Return the size, the time of writing and the inode."""
        with refusals("look at the file", self.path):
            status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ino

    def _header_digest(self) -> str:
        return self.identity.header_digest


class SafetensorsFile(IdentifiedFile):
    """An open file whose header has been checked. Use it as a context manager, or call `close`."""

    header: Header

    def __init__(self, path: Path) -> None:
        """Open the file and read its header.

        Raises:
            CheckpointFormatError: It is missing, no regular file, or breaks a rule of the format.
            DuplicateTensorError: Its header has two entries of one name.
            TensorShapeError: A shape and dtype don't make the bytes that the header claims.
        """
        OpenFile.__init__(self, path)
        try:
            self._read_header(*self._status())
        except BaseException:
            self.close()
            raise

    def _read_header(self, size: int, mtime_ns: int, inode: int) -> None:
        prefix = self._read(min(LENGTH.size, size))
        check_genuine(prefix, self.path)
        raw = self._read(header_size(prefix, size, file=self.path))
        self.header = parse_header(raw, size, file=self.path)
        self.identity = FileIdentity(size, mtime_ns, inode, self.header.digest)

    def _read(self, count: int) -> bytes:
        content = bytearray(count)
        self.read_into(0, memoryview(content))
        return bytes(content)

    def _header_digest(self) -> str:
        return hashlib.sha256(self._read(self.header.data_start)).hexdigest()

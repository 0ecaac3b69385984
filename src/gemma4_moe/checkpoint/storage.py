"""Opening files that may be anything, small durable writes, and the disk's refusals as this package's errors."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gemma4_moe.errors import CheckpointFormatError, StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The errors of a disk that has no room left.
FULL = (errno.ENOSPC, errno.EDQUOT)

_HINTS = {
    errno.ENOSPC: "free some space, or name a directory on another disk",
    errno.EDQUOT: "free some of your quota, or name a directory on another disk",
    errno.EACCES: "check the permissions of the file and of the directories above it",
    errno.EPERM: "check the permissions of the file and of the directories above it",
    errno.EROFS: "name a directory on a disk that can be written",
    errno.EIO: "check the disk: it could not read or write",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "mend the links: they lead in a circle",
    errno.ENOENT: "check the path, and whether it or the working directory was removed meanwhile",
}


@contextmanager
def refusals(action: str, file: object) -> Iterator[None]:
    """Turn an OSError into a StorageError that says that `action` on `file` failed, and why."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise refusal(action, file, error) from error


def refusal(action: str, file: object, error: OSError) -> StorageError:
    """Return the StorageError for `error`, met at `action` on `file`."""
    reason = error.strerror or str(error)
    return StorageError(f"can't {action}: {reason}", file=file, hint=_HINTS.get(error.errno or 0))


def resolved(path: Path) -> Path:
    """Return a path from the root and without links. The path need not exist; links may not lead in a circle."""
    with refusals("look at the path", path):
        try:
            return path.resolve()
        except RuntimeError as error:  # what Python before 3.13 says of such links
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error


def temporary_directory(prefix: str) -> tempfile.TemporaryDirectory[str]:
    """Make a directory that is removed with the end of its context."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix)
    except OSError as error:
        raise StorageError(
            f"can't make a temporary directory: {error.strerror}",
            file=error.filename,
            hint="free some space, or let TMPDIR name a directory on another disk",
        ) from error


def regular_status(path: Path) -> os.stat_result:
    """Return the status of a regular file, or of the one that a link leads to.

    Raises:
        CheckpointFormatError: The file is missing, or is no regular file.
    """
    with _missing_is_input(path), refusals("look at the file", path):
        status = path.stat()
    _require_regular(path, status.st_mode)
    return status


def open_regular(path: Path) -> int:
    """Open a regular file for reading, links to one included, and return its descriptor.

    Pipes, devices, sockets and directories are refused without being opened, so that none can block or act.

    Raises:
        CheckpointFormatError: The file is missing, or is no regular file.
    """
    regular_status(path)
    # Should the file have been exchanged for a pipe since, O_NONBLOCK keeps the open from waiting for a writer.
    with _missing_is_input(path), refusals("open the file", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_whole(path: Path, longest: int) -> bytes:
    """Read a regular file of at most `longest` bytes.

    Raises:
        CheckpointFormatError: The file is missing, no regular file, or longer.
    """
    descriptor = open_regular(path)
    with refusals("read the file", path), os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        content = file.read(min(longest, size) + 1)  # a read reserves what it asks for
    if len(content) > longest:
        raise too_large(path, longest, f"{size} bytes")
    return content


def too_large(file: object, most: int, found: str) -> CheckpointFormatError:
    """Return the error for a file without weights that has more than `most` bytes."""
    problem, hint = "a file that is far larger than such a file can be", "put the real file in its place"
    return CheckpointFormatError(problem, file=file, expected=f"at most {most} bytes", found=found, hint=hint)


def read_at(descriptor: int, path: Path, offset: int, destination: memoryview) -> None:
    """Fill `destination` (C-contiguous) with an open file's bytes from `offset` on.

    Raises:
        CheckpointFormatError: The file ends too early: it was cut off after it was opened.
    """
    view = destination if destination.nbytes == 0 else destination.cast("B")
    while view.nbytes:
        with refusals("read the file", path):
            count = os.preadv(descriptor, [view], offset)
        if count == 0:
            raise CheckpointFormatError(
                "the file is truncated, or changed while it was read",
                file=path,
                expected=f"{view.nbytes} more bytes at byte {offset}",
                found="the end of the file",
                hint="let nothing write the source, and start again",
            )
        view = view[count:]
        offset += count


def sync_directory(path: Path) -> None:
    """Bring a directory's own entries to the device."""
    with refusals("bring the directory to the disk", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file, which must not exist yet, and bring it to the device."""
    with refusals("write the file", path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _missing_is_input(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        raise CheckpointFormatError(
            "a file that should be there is missing",
            file=path,
            expected="a file",
            found="a link that leads nowhere" if path.is_symlink() else "nothing",
            hint=f"fetch {path.name} again",
        ) from error


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise CheckpointFormatError(
            "not a regular file",
            file=path,
            expected="a file, or a link to one",
            found=_kind(mode),
            hint="put the real file in its place",
        )


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    return kinds.get(stat.S_IFMT(mode), "something else")

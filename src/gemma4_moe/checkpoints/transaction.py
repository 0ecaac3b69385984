"""A target directory that is absent, or complete: everything is written beside it and published by one rename.

While a conversion runs, `.NAME.gemma4-moe/` stands beside the target NAME. It holds the lock and `out/`, which becomes
the target. Whoever holds the lock owns the target; a lock dies with its process.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

from gemma4_moe.checkpoints.storage import refusal, refusals
from gemma4_moe.errors import TargetBusyError, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def control_directory(target: Path) -> Path:
    """Return the directory that stands beside `target` while it is written."""
    return target.with_name(f".{target.name}.gemma4-moe")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a target.

    Attributes:
        pid: Its number on its host.
        host: The host's name.
    """

    pid: int
    host: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class Transaction:
    """The writing of one target. As a context manager it takes everything back unless `publish` was called.

    Attributes:
        target: The directory that `publish` makes appear.
        out: Where its files are written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target.resolve()
        self._control = control_directory(self.target)
        self.out = self._control / "out"
        self._lock = -1

    def __enter__(self) -> Self:
        """Take the lock and make an empty `out`.

        Raises:
            TargetBusyError: Another process is writing this target.
            StorageError: The disk or its permissions refused.
        """
        with refusals("make the directory", self._control):
            self._control.mkdir(exist_ok=True)
        self._take_lock()
        try:
            self._sign_lock()
            with refusals("make the directory", self.out):
                if self.out.exists():  # of a run that was killed
                    shutil.rmtree(self.out)
                self.out.mkdir()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._remove()

    def publish(self, *, overwrite: bool) -> None:
        """Make `out` the target, in one step, once its files are on the device.

        Raises:
            UsageError: The target has come into being since it was checked.
            StorageError: The disk or its permissions refused.
        """
        sync_directory(self.out)
        with refusals("publish the target", self.target):
            if overwrite and self.target.exists():
                _rename(self.out, self.target, _RENAME_EXCHANGE)
            else:
                self._publish_new()
        sync_directory(self.target.parent)

    def _publish_new(self) -> None:
        if self.target.is_dir() and not any(self.target.iterdir()):
            self.out.rename(self.target)
            return
        try:
            _rename(self.out, self.target, _RENAME_NOREPLACE)
        except FileExistsError as error:
            raise UsageError(
                "the target has come into being since it was checked", file=self.target, hint="name another directory"
            ) from error

    def _take_lock(self) -> None:
        path = self._control / "owner"
        with refusals("open the lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            found = os.pread(descriptor, 200, 0).decode(errors="backslashreplace")
            os.close(descriptor)
            raise TargetBusyError(
                "another process is writing this target",
                file=self.target,
                found=found or "a process that has not given its name yet",
                hint="wait until it has ended, or name another directory",
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise refusal("lock the target", path, error) from error
        self._lock = descriptor

    def _sign_lock(self) -> None:
        with refusals("sign the lock", self._control):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(Owner(os.getpid(), socket.gethostname())).encode(), 0)

    def _remove(self) -> None:
        with refusals("remove the directory", self._control):
            shutil.rmtree(self._control)
        os.close(self._lock)


def sync_directory(path: Path) -> None:
    """Bring a directory's own entries to the device.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    with refusals("bring the directory to the disk", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_file(path: Path, content: bytes) -> None:
    """Write a new small file and bring it to the device.

    Raises:
        StorageError: The disk or its permissions refused, or the file exists.
    """
    with refusals("write the file", path), path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _rename(old: Path, new: Path, flags: int) -> None:
    """Rename with renameat2's flags, which decide inside the filesystem what a check beforehand can't."""
    renameat2 = _renameat2()
    if renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))


@cache
def _renameat2() -> Any:
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "renameat2 is Linux's")
    function = ctypes.CDLL(None, use_errno=True).renameat2
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function

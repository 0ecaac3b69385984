"""The lock of a target: one process writes it at a time, and errors name it.

On one host the lock is `flock`'s, which dies with its process. Not every shared filesystem carries it from host to
host, and some have no locks at all. So the owner also writes its name into the file, and removes it when it is done. A
name that `flock` can't vouch for counts as an owner until a user says, with `--break-lock`, that its process is gone.
A disk that refuses is a StorageError everywhere.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.storage import FULL, refusal, refusals
from gemma4_moe.errors import TargetBusyError

if TYPE_CHECKING:
    from pathlib import Path

#: What a filesystem answers that has no locks at all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

#: The owner can remove the file between our opening it and our locking it.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a target, or was killed meanwhile. `since` is in seconds since the epoch."""

    pid: int
    host: str
    since: float

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since, UTC)
        return f"process {self.pid} on {self.host}, since {since:%Y-%m-%d %H:%M:%S} UTC"


class Lock:
    """The right to write one target."""

    def __init__(self, path: Path, *, break_lock: bool = False) -> None:
        """Take the lock.

        Args:
            path: The file that carries it; made if it does not exist.
            break_lock: Take it from an owner that `flock` can't vouch for: one of another host, or on a filesystem
                without locks.

        Raises:
            TargetBusyError: Another process has it.
        """
        self.path = path
        for _ in range(_ATTEMPTS):
            taken = _take(path, break_lock=break_lock)
            if taken is not None:
                self._descriptor, self._name = taken
                return
        raise _busy(path, _read_owner(path), breakable=False)

    def confirm(self) -> None:
        """Raise a TargetBusyError if another process has broken the lock."""
        if self.is_broken():
            problem = "another process has broken this lock and taken the target"
            found = _read_owner(self.path) or "no lock"
            raise TargetBusyError(problem, file=self.path, found=found, hint="let only one of them run")

    def is_broken(self) -> bool:
        """Return whether the file has lost our name. Another process then owns what the lock guards."""
        with refusals("look at the lock", self.path), suppress(FileNotFoundError):
            return self.path.read_bytes() != self._name
        return True

    def release(self) -> None:
        """Release the lock and remove our name."""
        try:
            with refusals("release the lock", self.path):
                os.ftruncate(self._descriptor, 0)
        finally:
            self.forget()

    def forget(self) -> None:
        """Release the lock after its file was removed."""
        os.close(self._descriptor)


def _take(path: Path, *, break_lock: bool) -> tuple[int, bytes] | None:
    """Return the locked descriptor and our name. None asks for another attempt: the file was removed or replaced."""
    with ExitStack() as stack:
        with refusals("open the lock", path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, descriptor)
        locked = _try_lock(descriptor, path)
        if locked and not _is_at(descriptor, path):
            return None
        owner = _read_owner(path)
        breakable = owner is not None and (locked is None or owner.host != socket.gethostname())
        if locked is not False and not breakable:
            name = _sign(descriptor, path)
            stack.pop_all()
            return descriptor, name
        if not (breakable and break_lock):
            raise _busy(path, owner, breakable=breakable)
        with refusals("break the lock", path):
            path.unlink(missing_ok=True)
        return None


def _sign(descriptor: int, path: Path) -> bytes:
    """Write our name and return it. A full disk has no room for it, and must not keep `clean` from making some."""
    content = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}).encode()
    with refusals("sign the lock", path):
        os.ftruncate(descriptor, 0)
        try:
            os.pwrite(descriptor, content, 0)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return b""
    return content


def _try_lock(descriptor: int, path: Path) -> bool | None:
    """Return whether the lock was free, and is now ours. None means that the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise refusal("lock the target", path, error) from error
        return None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether `path` still names the open file."""
    with refusals("look at the lock", path), suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _read_owner(path: Path) -> Owner | None:
    """Return the process whose name is in the lock, or None without a sensible name."""
    try:
        name: dict[str, Any] = json.loads(path.read_bytes())
        return Owner(int(name["pid"]), str(name["host"]), float(name["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _busy(path: Path, owner: Owner | None, *, breakable: bool) -> TargetBusyError:
    found = owner or "a process that has not given its name yet"
    hint = "wait until it has ended, or name another target"
    if breakable:
        hint = "if that process is gone, give --break-lock"
    return TargetBusyError("another process is writing this target", file=path.parent, found=found, hint=hint)

"""Who writes a target: one process at a time, known to all others by host, number and age.

The lock is `flock`'s and dies with its process. Not every shared filesystem carries it from host to host, so the owner
also leaves its name and touches the file as it goes on: another host's fresh name counts as a lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma4_moe.checkpoint.storage import FULL, refusal, refusals
from gemma4_moe.errors import StorageError, TargetBusyError

if TYPE_CHECKING:
    from pathlib import Path

#: After this many seconds without a sign, another host's owner is taken to be dead.
STALE_AFTER = 600.0

#: What a filesystem says that has no locks at all.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

#: A control directory can be removed by its owner between our opening it and our locking it.
_ATTEMPTS = 5


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that holds a target, or held it last.

    Attributes:
        pid: Its number on its host.
        host: The host's name.
        since: When it took the target, in seconds since the epoch.
        seen: When it last gave a sign, likewise.
    """

    pid: int
    host: str
    since: float
    seen: float

    def __str__(self) -> str:
        now = time.time()
        return (
            f"process {self.pid} on {self.host}, since {_age(now - self.since)}, last sign {_age(now - self.seen)} ago"
        )

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this host."""
        return self.host == socket.gethostname()

    def may_live(self) -> bool:
        """Say whether the process may still be running."""
        if not self.is_here:
            return time.time() - self.seen < STALE_AFTER
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True


class Lock:
    """The right to write one target."""

    def __init__(self, path: Path, *, break_lock: bool = False) -> None:
        """Take the lock.

        Args:
            path: The file that carries it; made if it does not exist.
            break_lock: Take it from an owner that can't be shown to live.

        Raises:
            TargetBusyError: Another process has it.
            StorageError: The disk or its permissions refused.
        """
        self.path = path
        for _ in range(_ATTEMPTS):
            descriptor = self._open_and_lock(break_lock=break_lock)
            if descriptor is not None:
                self._descriptor = descriptor
                try:
                    self._sign()
                except BaseException:
                    self.forget()
                    raise
                return
        raise _busy(path, _read_owner(path))

    def confirm(self) -> None:
        """Give a sign of life, and check that the lock was not broken.

        Raises:
            TargetBusyError: Another process has broken it.
        """
        if self.is_broken():
            raise TargetBusyError(
                "another process has broken this lock and taken the target",
                file=self.path,
                found=_read_owner(self.path) or "no lock",
                hint="let only one of them run",
            )
        with refusals("sign the lock", self.path):
            os.utime(self._descriptor)

    def is_broken(self) -> bool:
        """Say whether another process has broken the lock: then what it guards is that process' own.

        Raises:
            StorageError: The disk or its permissions refused.
        """
        return not _is_at(self._descriptor, self.path)

    def release(self) -> None:
        """Give the lock back; the name goes with it."""
        try:
            with refusals("release the lock", self.path):
                os.ftruncate(self._descriptor, 0)
        finally:
            os.close(self._descriptor)

    def forget(self) -> None:
        """Give the lock back after its file was removed."""
        os.close(self._descriptor)

    def _open_and_lock(self, *, break_lock: bool) -> int | None:
        """Return the locked descriptor, or None where the file was exchanged meanwhile."""
        with refusals("open the lock", self.path):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            free = _try_lock(descriptor, self.path)
            if free and not _is_at(descriptor, self.path):
                return None
            owner = _read_owner(self.path)
            if free and not (owner and not owner.is_here and owner.may_live()):
                taken, descriptor = descriptor, -1
                return taken
            if not break_lock or (owner and owner.is_here and owner.may_live()):
                raise _busy(self.path, owner)
            with refusals("break the lock", self.path):
                self.path.unlink(missing_ok=True)
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _sign(self) -> None:
        """Leave our name. A full disk has no room for it, and must not keep `clean` from making some."""
        name = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
        with refusals("sign the lock", self.path):
            os.ftruncate(self._descriptor, 0)
            try:
                os.pwrite(self._descriptor, json.dumps(name).encode(), 0)
            except OSError as error:
                if error.errno not in FULL:
                    raise


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise refusal("lock the target", path, error) from error
        owner = _read_owner(path)
        return owner is None or not owner.may_live()
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Say whether `path` still names the open file."""
    with refusals("look at the lock", path):
        try:
            there = path.stat()
        except FileNotFoundError:
            return False
        here = os.fstat(descriptor)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)


def _read_owner(path: Path) -> Owner | None:
    """Return whose name is in the lock; None where there is none, or it is torn."""
    try:
        with path.open("rb") as file:
            name: dict[str, Any] = json.loads(file.read(1000))
            seen = os.fstat(file.fileno()).st_mtime
        return Owner(int(name["pid"]), str(name["host"]), float(name["since"]), seen)
    except (OSError, StorageError, ValueError, KeyError, TypeError):
        return None


def _busy(path: Path, owner: Owner | None) -> TargetBusyError:
    gone = owner is not None and not owner.is_here
    return TargetBusyError(
        "another process is writing this target",
        file=path.parent,
        found=owner or "a process that has not given its name yet",
        hint="if that process is gone, give --break-lock"
        if gone
        else "wait until it has ended, or name another target",
    )


def _age(seconds: float) -> str:
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{rest} s"

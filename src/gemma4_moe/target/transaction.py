"""A target directory that is absent or complete: its files are written next to it and published by one rename.

After a failure journalled work stays for a later run; all else is deleted.
"""

from __future__ import annotations

import errno
import json
from typing import TYPE_CHECKING, Self

from gemma4_moe.checkpoint.directory import control_directory
from gemma4_moe.checkpoint.storage import refusals, resolved, sync_directory, write_file
from gemma4_moe.errors import StorageError, UnfinishedRunError, UsageError, command_line
from gemma4_moe.sizes import format_size
from gemma4_moe.target.journal import recorded_command
from gemma4_moe.target.recovery import OLD, OUT, PUBLISHING, heal, leave, remove, remove_work, size_on_disk, take_lock
from gemma4_moe.target.renaming import exchange

if TYPE_CHECKING:
    from pathlib import Path

#: What a rename of a directory answers if its new name is that of anything but an empty directory.
_OCCUPIED = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class Transaction:
    """The writing of one target, in its directory `out`. At its end it leaves the target, or journalled work."""

    def __init__(self, target: Path, *, resume: bool = False, break_lock: bool = False) -> None:
        """Name the target; nothing is touched yet. `resume` continues an earlier run; without it, one is an error."""
        self.target = resolved(target)
        self.control = control_directory(self.target)
        self.out = self.control / OUT
        self._resume, self._break_lock = resume, break_lock

    def __enter__(self) -> Self:
        """Take the lock and make `out`: empty, or as the run that is resumed has left it."""
        heal(self.target)
        self._lock = take_lock(self.control, break_lock=self._break_lock)
        try:
            self._prepare()
        except BaseException as error:
            self._leave(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            remove(self.control, self._lock)
        else:
            self._leave(error)

    def confirm(self) -> None:
        """Check that the lock was not broken. Raises what `Lock.confirm` raises."""
        self._lock.confirm()

    def publish(self, *, overwrite: bool) -> None:
        """Make `out` the target, in one step, once its files are on the device. The lock must not be broken."""
        self.confirm()
        sync_directory(self.out)
        with refusals("publish the target", self.target):
            (self.control / PUBLISHING).unlink(missing_ok=True)
            write_file(self.control / PUBLISHING, json.dumps({"inode": self.out.stat().st_ino}).encode())
            sync_directory(self.control)
            if overwrite and self.target.is_dir() and any(self.target.iterdir()):
                _replace(self.out, self.target, self.control / OLD)
            else:
                _rename_new(self.out, self.target)
        sync_directory(self.target.parent)

    def _leave(self, error: BaseException) -> None:
        """Keep journalled work, or else delete all; an error in that is a note of `error`."""
        try:
            if self._lock.is_broken():
                self._lock.forget()  # the directory is another process' work now
            else:
                leave(self.control, self._lock)
        except StorageError as trouble:
            error.add_note(str(trouble))

    def _prepare(self) -> None:
        begun = recorded_command(self.control)
        if begun is not None and not self._resume:
            clean = command_line("gemma4-moe", "clean", self.target)
            raise UnfinishedRunError(
                "an earlier run to this target was not finished",
                file=self.control,
                found=f"{format_size(size_on_disk(self.control))} on the disk",
                hint=f"resume it: {begun}; or remove it: {clean}",
            )
        with refusals("make the directory", self.out):
            (self.control / PUBLISHING).unlink(missing_ok=True)
            if begun is None:
                remove_work(self.control)
            self.out.mkdir(exist_ok=True)
        sync_directory(self.control)
        sync_directory(self.control.parent)


def _rename_new(out: Path, target: Path) -> None:
    """Rename `out` to a name that is free, or is that of an empty directory."""
    try:
        out.rename(target)
    except OSError as error:
        if error.errno not in _OCCUPIED:
            raise
        raise UsageError(
            "the target has come into being since it was checked", file=target, hint="name another directory"
        ) from error


def _replace(out: Path, target: Path, old: Path) -> None:
    """Put `out` in the place of `target`, in one step if the filesystem can.

    Otherwise it takes two. A failure between them is undone here; after a kill, `heal` does the second step.
    """
    if exchange(out, target):
        return
    try:
        target.rename(old)
        _rename_new(out, target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise

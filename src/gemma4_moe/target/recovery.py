"""The control directory of a target, and how the work of an unfinished run in it is finished or deleted.

The directory `.NAME.gemma4-moe/` next to NAME holds the lock, the journals and `out/`, which becomes the target.
"""

from __future__ import annotations

import errno
import json
import shutil
from typing import TYPE_CHECKING, NamedTuple

from gemma4_moe.checkpoint.directory import control_directory
from gemma4_moe.checkpoint.paths import expanded
from gemma4_moe.checkpoint.storage import refusals, resolved, sync_directory
from gemma4_moe.errors import CheckpointFormatError, TargetBusyError, command_line
from gemma4_moe.target.journal import journals, recorded_command
from gemma4_moe.target.locking import Lock

if TYPE_CHECKING:
    from pathlib import Path

#: The directory that becomes the target.
OUT = "out"

#: The former target, while it is replaced, if the filesystem can't exchange two directories in one step.
OLD = "old"

#: A note that all of OUT is on the device, and that the rename comes next.
PUBLISHING = "publishing"

_OWNER = "owner"


class Remains(NamedTuple):
    """The directory of an unfinished run's work, its size on the disk, and the command that resumes it, if one can."""

    path: Path
    nbytes: int
    command: str | None


def take_lock(control: Path, *, break_lock: bool = False) -> Lock:
    """Make the control directory, if it is not there, and take its lock. Raises what `Lock` raises."""
    with refusals("make the target in the directory", control.parent):
        control.mkdir(exist_ok=True)
    return Lock(control / _OWNER, break_lock=break_lock)


def remains(target: Path) -> Remains | None:
    """Return the work of an unfinished run to `target`, or None."""
    control = control_directory(resolved(target))
    with refusals("look at the directory", control):
        is_there = control.is_dir()
    return Remains(control, size_on_disk(control), recorded_command(control)) if is_there else None


def heal(target: Path) -> None:
    """Finish a publish that was interrupted, if there is one and no other process is at it."""
    target = resolved(target)
    control = control_directory(target)
    if not _is_publishing(control):
        return
    try:
        lock = take_lock(control)
    except TargetBusyError:
        return  # its owner heals it first
    if _is_publishing(control):
        _finish_publish(target, control, lock)
    else:
        leave(control, lock)  # another process has just done it


def clean(target: str | Path, *, break_lock: bool = False) -> Remains | None:
    """Delete the work of an unfinished run to `target`, and return it, or None. Raises what `Lock` raises."""
    target = expanded(target)
    heal(target)
    found = remains(target)
    if found is not None:
        remove(found.path, take_lock(found.path, break_lock=break_lock))
    return found


def check_published(directory: Path) -> None:
    """Check that no conversion to `directory` was interrupted while it was published. Nothing on the disk changes."""
    control = control_directory(resolved(directory))
    if _is_publishing(control):
        command = recorded_command(control)
        raise CheckpointFormatError(
            "a conversion to this directory was interrupted while it was published",
            file=directory,
            expected="a directory whose conversion has ended",
            found=control,
            hint=command_line("gemma4-moe", "clean", directory)
            + ("" if command is None else f"; or finish it: {command}"),
        )


def _is_publishing(control: Path) -> bool:
    with refusals("look at the directory", control):
        return (control / PUBLISHING).exists()


def _finish_publish(target: Path, control: Path, lock: Lock) -> None:
    """Finish after the note `publishing`. If the rename itself was not made, leave all as it is."""
    inode = _published_inode(control)
    with refusals("finish publishing the target", target):
        if inode is not None and (control / OLD).exists() and not target.exists():
            (control / OUT).rename(target)
        published = inode is not None and target.exists() and target.stat().st_ino == inode
    if published:
        sync_directory(target.parent)
        remove(control, lock)
    else:
        lock.release()


def _published_inode(control: Path) -> int | None:
    """Return the inode of the directory that was about to be published; None where the note is torn."""
    with refusals("read the file", control / PUBLISHING):
        note = (control / PUBLISHING).read_bytes()
    try:
        return int(json.loads(note)["inode"])
    except (ValueError, KeyError, TypeError):
        return None


def leave(control: Path, lock: Lock) -> None:
    """Release the lock. Keep the work if a later run can resume it or finish publishing it; otherwise delete it."""
    if recorded_command(control) is not None or (control / OLD).exists():
        lock.release()
    else:
        remove(control, lock)


def remove_work(control: Path) -> None:
    """Delete the work in `control`, the journals first: without them no run resumes from the rest."""
    for path in journals(control):
        path.unlink()
    for name in (OUT, OLD):
        if (control / name).exists():
            shutil.rmtree(control / name)


def remove(control: Path, lock: Lock) -> None:
    """Remove a control directory and give its lock back."""
    with refusals("remove the directory", control):
        remove_work(control)
        (control / PUBLISHING).unlink(missing_ok=True)
        (control / _OWNER).unlink()
        try:
            control.rmdir()
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:  # then another process has begun to use it
                raise
    lock.forget()


def size_on_disk(directory: Path) -> int:
    """Return the size on the disk of all files below `directory`, in bytes."""
    with refusals("look at the directory", directory):
        return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*"))

"""Renames that decide inside the filesystem what a check beforehand can't, and what takes their place elsewhere."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

_NOREPLACE = 1
_EXCHANGE = 2
_AT_FDCWD = -100

#: What a kernel or a filesystem says that doesn't know the flag.
_UNKNOWN = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def rename_new(old: Path, new: Path) -> None:
    """Rename a directory to a name that is free, or is that of an empty directory.

    Raises:
        FileExistsError: There is something at `new`.
    """
    if new.is_dir() and not new.is_symlink():
        _rename_onto(old, new)
    elif not _renameat2(old, new, _NOREPLACE):
        if new.is_symlink() or new.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
        old.rename(new)


def _rename_onto(old: Path, new: Path) -> None:
    try:
        old.rename(new)  # fails unless `new` is empty
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new)) from error


def exchange(one: Path, other: Path) -> bool:
    """Exchange two directories in one step; return False, with nothing done, where the filesystem can't."""
    return _renameat2(one, other, _EXCHANGE)


def _renameat2(old: Path, new: Path, flags: int) -> bool:
    function = _system_call()
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return False
    raise OSError(code, os.strerror(code), str(new))


@cache
def _system_call() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).renameat2
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function

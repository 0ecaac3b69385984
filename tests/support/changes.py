"""Changes of a file that a reader of it has to notice."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def touched(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def longer(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"x")


def another_header(file: Path) -> None:
    """Change the header in its place: the file is never shorter, so a reader of this moment reads on."""
    with file.open("r+b") as opened:
        opened.seek(file.read_bytes().index(b'"format":"pt"'))
        opened.write(b'"format":"np"')


def replaced(file: Path) -> None:
    copy = file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


def moved_away(file: Path) -> None:
    file.rename(file.with_name("moved"))


CHANGES = (touched, longer, another_header, replaced, moved_away)


def behind_its_time(change: Callable[[Path], None], file: Path) -> None:
    """Change a file, and put its time of writing back."""
    status = file.stat()
    change(file)
    if change not in (touched, moved_away):
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

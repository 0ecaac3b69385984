"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """Return a path with a leading `~` or `~user` replaced by that home directory, as a shell does.

    Where no such user or home directory is known, the path stays as it is.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)

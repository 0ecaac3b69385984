"""The calls that decide what a power cut leaves, in their order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma4_moe.target import transaction

if TYPE_CHECKING:
    import pytest


class Order:
    """Notes every fsync, rename and removal of a directory, and what a directory held when it was synced.

    Attributes:
        calls: The name of each call, and its paths below the root.
        held: For each call that synced a directory, its number and the names in that directory.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.calls: list[tuple[str, ...]] = []
        self.held: dict[int, set[str]] = {}
        fsync, rename, rmdir = os.fsync, os.rename, os.rmdir
        exchange = transaction.exchange

        def synced(descriptor: int) -> None:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_dir():
                self.held[len(self.calls)] = {entry.name for entry in path.iterdir()}
            self.note("fsync", path)
            fsync(descriptor)

        def renamed(old: Path, new: Path) -> None:
            self.note("rename", old, new)
            rename(old, new)

        def exchanged(one: Path, other: Path) -> bool:
            self.note("exchange", one, other)
            return exchange(one, other)

        def removed(path: Path, **more: Any) -> None:
            self.note("rmdir", path)
            rmdir(path, **more)

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)
        monkeypatch.setattr(os, "rmdir", removed)
        monkeypatch.setattr(transaction, "exchange", exchanged)

    def note(self, call: str, *paths: Path) -> None:
        self.calls.append((call, *(os.path.relpath(path, self.root) for path in paths)))

    def synced_holding(self, directory: str, names: set[str]) -> int:
        """The number of the first call that synced `directory` when it held all of `names`."""
        return next(
            number for number, held in self.held.items() if self.calls[number][1] == directory and names <= held
        )

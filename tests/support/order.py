"""The calls that decide what a power cut leaves, in their order."""

import os
from pathlib import Path

from gemma4_moe.target import transaction


class Order:
    """Notes every fsync, rename and removal of a directory, and what a directory held when it was synced."""

    def __init__(self, root, monkeypatch):
        self.root = root
        self.calls: list[tuple[str, ...]] = []  # the name of each, and its paths below the root
        self.held: dict[int, set[str]] = {}  # by the number of the call that synced a directory: the names in it
        fsync = os.fsync

        def synced(descriptor):
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_dir():
                self.held[len(self.calls)] = {entry.name for entry in path.iterdir()}
            self.note("fsync", path)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)
        for module, call in ((os, "rename"), (os, "rmdir"), (transaction, "exchange")):
            monkeypatch.setattr(module, call, self.noted(call, getattr(module, call)))

    def noted(self, call, function):
        def with_note(*paths, **more):
            self.note(call, *paths)
            return function(*paths, **more)

        return with_note

    def note(self, call, *paths):
        self.calls.append((call, *(os.path.relpath(path, self.root) for path in paths)))

    def synced_holding(self, directory, names):
        """The number of the first call that synced `directory` when it held all of `names`."""
        return next(
            number for number, held in self.held.items() if self.calls[number][1] == directory and names <= held
        )

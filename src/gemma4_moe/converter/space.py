"""The space that a conversion needs: on the disk of its target, and on that of the Hub's cache."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemma4_moe.checkpoint.storage import refusals
from gemma4_moe.hub.remote import bytes_to_fetch, cache_directory

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from gemma4_moe.checkpoint.directory import Checkpoint


@dataclass(frozen=True, slots=True)
class Space:
    """What a conversion needs and what there is, in bytes.

    Attributes:
        target_bytes: Size of the target's weights.
        free_bytes: Free space on the disk that would hold the target.
        cache_bytes: Size of the weights that would be brought into the Hub's cache first.
        cache_free_bytes: Free space on another disk that holds this cache; None where the target's disk holds it too,
            or nothing is brought there.
    """

    target_bytes: int
    free_bytes: int
    cache_bytes: int = 0
    cache_free_bytes: int | None = None

    @property
    def missing_bytes(self) -> int:
        """How much more space is needed than there is; 0 if all fits."""
        if self.cache_free_bytes is None:
            return max(0, self.target_bytes + self.cache_bytes - self.free_bytes)
        return self.missing_without_cache + max(0, self.cache_bytes - self.cache_free_bytes)

    @property
    def missing_without_cache(self) -> int:
        """How much would be missing if the source were streamed."""
        return max(0, self.target_bytes - self.free_bytes)


def measure_space(sources: Iterable[Checkpoint], target_bytes: int, disk: Path, *, stream: bool) -> Space:
    """Return the space for a target of `target_bytes` on the disk of the directory `disk`.

    Args:
        sources: What is read, opened for its headers.
        target_bytes: Size of the target's weights.
        disk: The directory that would hold the target.
        stream: Whether what is on the Hub would be left there.

    Raises:
        StorageError: The disk or its permissions refused.
    """
    with refusals("ask for the free space", disk):
        free = shutil.disk_usage(disk).free
        device = disk.stat().st_dev
    to_fetch = 0 if stream else sum(bytes_to_fetch(source) for source in sources)
    if not to_fetch:
        return Space(target_bytes, free)
    cache = cache_directory()
    with refusals("ask for the free space", cache):
        cache = next(path for path in (cache, *cache.parents) if path.exists())
        other = cache.stat().st_dev != device
        return Space(target_bytes, free, to_fetch, shutil.disk_usage(cache).free if other else None)
